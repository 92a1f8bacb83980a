"""Kinds of data. Each has formats, and a function that converts a row to records."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from orchestrator.data import canonical
from orchestrator.data.formats.demonstrations import DEMONSTRATION_FORMATS
from orchestrator.data.formats.documents import DOCUMENT_FORMATS
from orchestrator.data.formats.feedback import LABEL_FORMATS, SCORE_FORMATS
from orchestrator.data.formats.format import Format, LeftOut
from orchestrator.data.formats.prompts import EVERYWHERE, PROMPT_FORMATS
from orchestrator.data.formats.rankings import RANKING_FORMATS
from orchestrator.data.messages import BadRow, Fields, refuse_media, tools_of
from orchestrator.data.records import (
    DemonstrationRecord,
    DocumentRecord,
    LabelledRecord,
    Message,
    PromptRecord,
    RankingRecord,
    Reply,
    ScoredRecord,
    Tools,
    content_digest,
    content_id,
    id_of,
    identity_of,
    last_user_text,
    message_dicts,
    reply_json,
)
from orchestrator.data.values import describe

Record = TypeVar("Record")
New = tuple[Record, bytes]
"""A record, and a digest that is equal for equal records."""
REPLY_FIELDS = ("completion", "response", "reply")


@dataclass(frozen=True)
class Kind(Generic[Record]):
    """Args:
    section: config section, for messages.
    formats: by name; `auto` selects the first that fits.
    records: converts a row to records. Raises BadRow or LeftOut.
    parts: the messages of a record, and its other parts that take memory.
    row: the canonical row of a record, whose format `auto` detects.
    has_distinct_ids: whether ids must be unique.
    """

    section: str
    formats: Mapping[str, Format[Any]]
    records: Callable[[Fields, Format[Any]], Iterable[New[Record] | LeftOut]]
    parts: Callable[[Record], tuple[Any, ...]]
    row: Callable[[Record], dict[str, Any]]
    has_distinct_ids: bool = False


def _prompts(fields: Fields, form: Format[Any]) -> Iterator[New[PromptRecord] | LeftOut]:
    given, tools = _common(fields, form)
    meta = {key: value for key, value in fields.items() if key not in EVERYWHERE | form.consumed}
    for messages in form.parse(fields):
        if isinstance(messages, LeftOut):
            yield messages
            continue
        _check_messages(messages, tools)
        digest = content_digest(identity_of(messages, tools))
        record = PromptRecord(given or id_of(digest), messages, last_user_text(messages), tools=tools)
        yield replace(record, meta=_json_values(meta)) if meta else record, digest


def _answered(fields: Fields, form: Format[Any]) -> Iterator[New[PromptRecord] | LeftOut]:
    """Prompts with a reply among their other fields."""
    for found in _prompts(fields, form):
        if isinstance(found, LeftOut):
            yield found
            continue
        record, digest = found
        reply = reply_in(record)
        if not isinstance(reply, str):
            raise BadRow(
                f"needs a reply as text in one of the fields {', '.join(REPLY_FIELDS)}; found {describe(reply)}"
            )
        yield record, content_digest(digest.hex(), reply)


def reply_in(record: PromptRecord) -> Any:
    """The reply in the other fields of a prompt. None: there is none."""
    return next((record.meta[name] for name in REPLY_FIELDS if name in record.meta), None)


def _demonstrations(fields: Fields, form: Format[Any]) -> Iterator[New[DemonstrationRecord] | LeftOut]:
    given, tools = _common(fields, form)
    for messages in form.parse(fields):
        if isinstance(messages, LeftOut):
            yield messages
            continue
        replies = [index for index, turn in enumerate(messages) if turn.role == "assistant"]
        if not replies:
            yield LeftOut("conversations without a reply of the assistant")
            continue
        for index in replies:
            _require_learned(messages[index], f"turn {index + 1}")
        if any(not messages[index].content.strip() and not messages[index].tool_calls for index in replies):
            yield LeftOut("conversations with an empty reply")
            continue
        learned = messages[: replies[-1] + 1]
        yield from [LeftOut("turns after the last reply")] * (len(messages) - len(learned))
        _check_messages(learned, tools)
        digest = content_digest(identity_of(learned, tools))
        yield DemonstrationRecord(given or id_of(digest), learned, tools), digest


def _rankings(fields: Fields, form: Format[Any]) -> Iterator[New[RankingRecord] | LeftOut]:
    given, tools = _common(fields, form)
    for found in form.parse(fields):
        if isinstance(found, LeftOut):
            yield found
            continue
        messages, replies, scores = found
        _check_messages(messages, tools, replies)
        digest = content_digest(identity_of(messages, tools), [reply_json(reply) for reply in replies])
        yield RankingRecord(given or content_id(messages, tools), messages, replies, tools, scores), digest


def _judged(fields: Fields, form: Format[Any], make: Callable[..., Record]) -> Iterator[New[Record] | LeftOut]:
    """Replies with a score or a label."""
    given, tools = _common(fields, form)
    for found in form.parse(fields):
        if isinstance(found, LeftOut):
            yield found
            continue
        messages, reply, verdict = found
        _check_messages(messages, tools, [reply])
        digest = content_digest(identity_of(messages, tools), reply_json(reply), verdict)
        yield make(given or content_id(messages, tools), messages, reply, verdict, tools), digest


def _documents(fields: Fields, form: Format[Any]) -> Iterator[New[DocumentRecord] | LeftOut]:
    given = given_id(fields, form.id_key)
    for text in form.parse(fields):
        if isinstance(text, LeftOut):
            yield text
            continue
        _check_text([text])
        digest = content_digest(text)
        yield DocumentRecord(given or id_of(digest), text), digest


PROMPTS = Kind[PromptRecord](
    "prompts",
    PROMPT_FORMATS,
    _prompts,
    lambda record: (record.messages, record.meta, record.tools),
    canonical.prompt_row,
    has_distinct_ids=True,
)
ANSWERED = replace(PROMPTS, section="score", records=_answered, has_distinct_ids=False)
DEMONSTRATIONS = Kind[DemonstrationRecord](
    "demonstrations",
    DEMONSTRATION_FORMATS,
    _demonstrations,
    lambda record: (record.messages, record.tools),
    canonical.demonstration_row,
)
RANKINGS = Kind[RankingRecord](
    "preferences",
    RANKING_FORMATS,
    _rankings,
    lambda record: (record.messages, record.replies, record.tools, record.scores),
    canonical.ranking_row,
)


LABELS = Kind[LabelledRecord](
    "preferences",
    LABEL_FORMATS,
    lambda fields, form: _judged(fields, form, LabelledRecord),
    lambda record: (record.messages, [record.reply], record.tools),
    canonical.labelled_row,
)
SCORES = Kind[ScoredRecord](
    "preferences",
    SCORE_FORMATS,
    lambda fields, form: _judged(fields, form, ScoredRecord),
    lambda record: (record.messages, [record.reply], record.tools),
    canonical.scored_row,
)
DOCUMENTS = Kind[DocumentRecord](
    "demonstrations", DOCUMENT_FORMATS, _documents, lambda record: ((), record.text), canonical.document_row
)

KINDS: Mapping[str, Kind[Any]] = {
    "preferences": RANKINGS,
    "labels": LABELS,
    "scores": SCORES,
    "demonstrations": DEMONSTRATIONS,
    "documents": DOCUMENTS,
    "prompts": PROMPTS,
}
"""By name; kinds whose rows have more fields come first."""


def _common(fields: Fields, form: Format[Any]) -> tuple[str | None, Tools]:
    """The id in the row, if any, and its tools."""
    refuse_media(fields, "the row")
    return given_id(fields, form.id_key), tools_of(fields)


def _check_messages(messages: Sequence[Message], tools: Tools, replies: Iterable[Reply] = ()) -> None:
    _check_text(reply for reply in replies if isinstance(reply, str))
    for message in (*messages, *(reply for reply in replies if isinstance(reply, Message))):
        plain = (message.tool_calls, message.name, message.tool_call_id, message.extra) == ((), None, None, None)
        _check_text([message.content if plain else json.dumps(message_dicts([message]), ensure_ascii=False)])
    if tools:
        _check_text([json.dumps(tools, ensure_ascii=False)])


def _require_learned(reply: Message, where: str) -> None:
    """Raises BadRow for a reply that is marked as not to be learned, as OpenAI's and axolotl's formats allow."""
    marks = {} if reply.extra is None else json.loads(reply.extra)
    if marks.get("weight") == 0 or marks.get("train") is False:
        raise BadRow(f"{where} is marked as not to be learned (weight or train), but every reply is; remove the row")


def _check_text(texts: Iterable[str]) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code = f"{ord(text[error.start]):04x}"
            raise BadRow(f"contains \\u{code}, half of a surrogate pair; remove it") from None


def given_id(fields: Fields, key: str) -> str | None:
    given = fields.get(key)
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, str | int) or given == "":
        raise BadRow(f"{key!r} must be text or an integer, found {describe(given)}")
    _check_text([str(given)])
    return str(given)


def _json_values(meta: dict[str, Any]) -> dict[str, Any]:
    """Meta is JSON: values that only Parquet has (dates, bytes, decimals) become text, NaN becomes null."""
    try:
        text = json.dumps(meta, ensure_ascii=False, default=str)
        _check_text([text])
        return dict(json.loads(text, parse_constant=lambda name: None))
    except (RecursionError, ValueError):
        raise BadRow("nested too deeply, or a number with thousands of digits") from None
