"""Reads prompts and preferences from files. Every row is checked, and none is dropped silently.

A bad row (not JSON, a missing field, a wrong type) is an error that names file, row, fault and way out; up to
MAX_BAD_ROWS are collected in one message. A well-formed row that adds nothing (a repeated prompt, chosen equal to
rejected: the published hh-rlhf files hold a few) is left out and counted in the report.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.data.files import file_bytes, read_rows
from orchestrator.data.formats.prompts import EVERYWHERE, PROMPT_FORMATS
from orchestrator.data.formats.rankings import RANKING_FORMATS
from orchestrator.data.formats.transcripts import FieldSets, LeftOut
from orchestrator.data.json_rows import Row
from orchestrator.data.limits import Kept
from orchestrator.data.messages import BadRow, refuse_media, tools_of
from orchestrator.data.records import (
    Message,
    PromptRecord,
    RankingRecord,
    ReadReport,
    Tools,
    content_digest,
    content_id,
    id_of,
    identity_of,
    last_user_text,
    message_dicts,
    reply_json,
)
from orchestrator.data.values import describe, field_names
from orchestrator.errors import DataError

MAX_BAD_ROWS = 5
DUPLICATE = "already read"


def read_prompts(
    path: str | Path, format: str = "auto", limit: int | None = None
) -> tuple[tuple[PromptRecord, ...], ReadReport]:
    """Reads prompts; of prompts with equal messages one is kept.

    Raises:
        DataError: the file can't be read, holds bad rows, or no prompt is left.
    """
    rows = _Rows(path, format, {name: known.fields for name, known in PROMPT_FORMATS.items()}, "prompts.format")
    records: list[PromptRecord] = []
    seen: set[bytes] = set()
    row_of_id: dict[str, int] = {}
    for row in rows:
        try:
            record, digest = _prompt_record(row.fields, rows.format)
            if digest in seen:
                raise LeftOut(DUPLICATE)
            if row.fields.get("id") is not None:
                _check_unique(record.id, row.number, row_of_id)
        except BadRow as problem:
            rows.bad(row, str(problem))
            continue
        except LeftOut as reason:
            rows.left_out[str(reason)] += 1
            continue
        seen.add(digest)
        records.append(record)
        rows.kept.add(record.messages, record.meta, record.tools)
        if len(records) == limit:
            break
    return tuple(records), rows.report(len(records))


def read_rankings(
    path: str | Path, format: str = "auto", limit: int | None = None
) -> tuple[tuple[RankingRecord, ...], ReadReport]:
    """Reads preferences; a row may give several records, and several records may be about one prompt.

    Raises:
        DataError: the file can't be read, holds bad rows, or no preference is left.
    """
    rows = _Rows(path, format, {name: known.fields for name, known in RANKING_FORMATS.items()}, "preferences.format")
    records: list[RankingRecord] = []
    seen: set[bytes] = set()
    for row in rows:
        try:
            found = _ranking_records(row.fields, rows.format)
        except BadRow as problem:
            rows.bad(row, str(problem))
            continue
        except LeftOut as reason:
            rows.left_out[str(reason)] += 1
            continue
        for record in found:
            replies = [reply_json(reply) for reply in record.replies]
            digest = content_digest(identity_of(record.messages, record.tools), replies)[:16]
            if digest in seen:
                rows.left_out[DUPLICATE] += 1
            elif limit is None or len(records) < limit:
                seen.add(digest)
                records.append(record)
                rows.kept.add(record.messages, record.replies, record.tools)
        if len(records) == limit:
            break
    return tuple(records), rows.report(len(records))


class _Rows:
    """The good rows of a file. Collects the bad ones and raises when there are enough of them, or at the end."""

    def __init__(self, path: str | Path, format: str, known: Mapping[str, FieldSets], key: str) -> None:
        if format != "auto" and format not in known:
            raise DataError(f"{key}={format!r} is not known; choose one of auto, {', '.join(known)}.")
        self.format = format
        self.left_out: Counter[str] = Counter()
        self._path, self._known, self._key = str(path), known, key
        self.kept = Kept(self._path, key.partition(".")[0], lambda: file_bytes(self._path))
        self._complaints: list[str] = []
        self._num_rows = 0

    def __iter__(self) -> Iterator[Row]:
        for row in read_rows(self._path):
            self._num_rows += 1
            self.kept.check_share(self._num_rows)
            if row.problem is not None:
                self.bad(row, row.problem)
                continue
            if self.format == "auto":
                self.format = self._detect(row)
            yield row

    def bad(self, row: Row, problem: str) -> None:
        self._complaints.append(f"row {row.number}: {problem}")
        if len(self._complaints) == MAX_BAD_ROWS:
            self._raise(f"the first {MAX_BAD_ROWS} bad rows")

    def report(self, num_records: int) -> ReadReport:
        """Raises the collected problems, if any; otherwise reports what was read."""
        if self._complaints:
            self._raise(f"{len(self._complaints)} bad row{'s' if len(self._complaints) > 1 else ''}")
        report = ReadReport(self._path, self.format, self._num_rows, num_records, dict(self.left_out))
        if not num_records:
            raise DataError(f"{report.summary()}. Give a file with at least one usable record.")
        return report

    def _detect(self, row: Row) -> str:
        for name, field_sets in self._known.items():
            if any(fields <= row.fields.keys() for fields in field_sets):
                return name
        raise DataError(
            f"{self._path}: row {row.number} fits no known format; its fields are: {field_names(row.fields)}. "
            f"Known formats: {_catalogue(self._known)}. Rename the fields, or set {self._key}."
        )

    def _raise(self, heading: str) -> None:
        lines = "\n  ".join(self._complaints)
        raise DataError(
            f"{self._path}: {heading} (read as {self._key}={self.format!r}):\n  {lines}\n"
            f"Mend or remove these rows, or set {self._key} if the format is another: {_catalogue(self._known)}."
        )


def _catalogue(known: Mapping[str, FieldSets]) -> str:
    return "; ".join(f"{name} {{{', '.join(sorted(field_sets[0]))}}}" for name, field_sets in known.items())


def _prompt_record(fields: Mapping[str, Any], format: str) -> tuple[PromptRecord, bytes]:
    """The record, and bytes that are equal for equal conversations."""
    form = PROMPT_FORMATS[format]
    refuse_media(fields, "the row")
    messages, tools = form.parse(fields), tools_of(fields)
    _check_messages(messages, tools)
    meta = {key: value for key, value in fields.items() if key not in EVERYWHERE | form.consumed}
    digest = content_digest(identity_of(messages, tools))
    record = PromptRecord(_given_id(fields) or id_of(digest), messages, last_user_text(messages), tools=tools)
    return replace(record, meta=_json_values(meta)) if meta else record, digest[:16]


def _ranking_records(fields: Mapping[str, Any], format: str) -> Sequence[RankingRecord]:
    refuse_media(fields, "the row")
    found, tools = list(RANKING_FORMATS[format].parse(fields)), tools_of(fields)
    for messages, replies in found:
        _check_messages((*messages, *(reply for reply in replies if isinstance(reply, Message))), tools)
        _check_text(reply for reply in replies if isinstance(reply, str))
    given = _given_id(fields)
    return [
        RankingRecord(given or content_id(messages, tools), messages, replies, tools) for messages, replies in found
    ]


def _check_messages(messages: Iterable[Message], tools: Tools) -> None:
    for message in messages:
        plain = (message.tool_calls, message.name, message.tool_call_id, message.extra) == ((), None, None, None)
        _check_text([message.content if plain else json.dumps(message_dicts([message]), ensure_ascii=False)])
    if tools:
        _check_text([json.dumps(tools, ensure_ascii=False)])


def _check_text(texts: Iterable[str]) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code = f"{ord(text[error.start]):04x}"
            raise BadRow(f"holds \\u{code}, half of a surrogate pair, which is no text; remove it") from None


def _given_id(fields: Mapping[str, Any]) -> str | None:
    given = fields.get("id")
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, str | int) or given == "":
        raise BadRow(f"'id' must be text or a whole number, found {describe(given)}")
    _check_text([str(given)])
    return str(given)


def _check_unique(identity: str, row_number: int, row_of_id: dict[str, int]) -> None:
    first = row_of_id.setdefault(identity, row_number)
    if first != row_number:
        raise BadRow(
            f"id {identity!r} is already that of row {first}, another prompt; make ids distinct or leave them out"
        )


def _json_values(meta: dict[str, Any]) -> dict[str, Any]:
    """Meta is JSON: values that only Parquet has (dates, bytes, decimals) become text, NaN becomes null."""
    try:
        text = json.dumps(meta, ensure_ascii=False, default=str)
        _check_text([text])
        return dict(json.loads(text, parse_constant=lambda name: None))
    except (RecursionError, ValueError):
        raise BadRow("nested too deeply, or a number with thousands of digits") from None
