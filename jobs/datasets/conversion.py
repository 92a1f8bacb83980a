"""Writes the records of a file in the canonical form of their kind, as JSONL or Parquet."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.command import say
from jobs.datasets.kinds import kinds_of
from orchestrator.data.kinds import KINDS, Kind
from orchestrator.data.mixtures import stream_of
from orchestrator.data.records import ReadReport, json_text
from orchestrator.errors import ConfigError, DataError
from orchestrator.run.storage import replacing

_BATCH_ROWS = 1000
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
Row = dict[str, Any]


def convert(file: Path, out: Path, to: str | None, kind: str | None, format: str) -> None:
    """Writes OUT, whole or not at all.

    Raises:
        ConfigError: `to` is missing or unknown.
        DataError: the file, or rows that do not fit one Parquet schema.
        StorageError: OUT can't be written.
    """
    write = _writer(out, to)
    name, *_ = kinds_of(file, kind)
    with replacing(out) as temporary:
        report = write(lambda: _Rows(KINDS[name], file, format), temporary)
    say(report.summary())
    say(f"{out}: {report.num_records} {name}")


class _Rows:
    """The canonical rows of a file."""

    def __init__(self, kind: Kind[Any], file: Path, format: str) -> None:
        self._kind, self._stream = kind, stream_of(kind, file, format)

    def __iter__(self) -> Iterator[Row]:
        yield from map(self._kind.row, self._stream)
        self.report = self._stream.report()


def _writer(out: Path, to: str | None) -> Callable[[Callable[[], _Rows], Path], ReadReport]:
    compression = _COMPRESSIONS.get(out.suffix)
    target = to or (out.with_suffix("") if compression else out).suffix.removeprefix(".")
    if target == "parquet":
        return _write_parquet
    if target == "jsonl":
        return lambda read, path: _write_jsonl(read(), path, compression)
    raise ConfigError(f"a file is written as jsonl or parquet, not as {target!r}: give --to, or OUT such an ending.")


def _write_jsonl(rows: _Rows, path: Path, compression: str | None) -> ReadReport:
    with pa.output_stream(str(path), compression=compression) as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    return rows.report


def _write_parquet(read: Callable[[], _Rows], path: Path) -> ReadReport:
    """Reads twice: the schema of all rows has to be known before the first is written."""
    try:
        schema = pa.schema([])
        for batch in _batches(read()):
            schema = pa.unify_schemas([schema, pa.schema(list(pa.array(batch).type))], promote_options="permissive")
        with pq.ParquetWriter(path, schema) as writer:
            rows = read()
            for batch in _batches(rows):
                writer.write_table(pa.Table.from_pylist(batch, schema))
    except (pa.ArrowException, OverflowError) as error:
        raise DataError(f"the rows do not fit one Parquet schema ({error}). Write JSONL: --to jsonl.") from error
    return rows.report


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    columns = map(_columns, rows)
    while batch := list(islice(columns, _BATCH_ROWS)):
        yield batch


def _columns(row: Row) -> Row:
    """The row with one type per field: replies are messages, and what may hold any fields is JSON text."""
    found = dict(row)
    if "tools" in found:
        found["tools"] = json_text(found["tools"])
    for key in ("messages", "prompt"):
        if key in found:
            found[key] = [_message(turn) for turn in found[key]]
    if "replies" in found:
        found["replies"] = [_message(reply) for reply in found["replies"]]
    if "completion" in found:
        found["completion"] = _message(found["completion"])
    return found


def _message(turn: Any) -> Row:
    turn = {"role": "assistant", "content": turn} if isinstance(turn, str) else turn
    return {**turn, "tool_calls": json_text(turn["tool_calls"])} if "tool_calls" in turn else turn
