"""Reads whole files of records into memory: files that are known to be short. Stages stream theirs (streams.py)."""

from __future__ import annotations

from pathlib import Path

from orchestrator.data.kinds import Kind, Record
from orchestrator.data.limits import Kept, record_bytes
from orchestrator.data.mixtures import size_of_data, stream_of
from orchestrator.data.records import ReadReport


def read_all(
    kind: Kind[Record], path: str | Path, format: str = "auto", limit: int | None = None
) -> tuple[tuple[Record, ...], ReadReport]:
    """Raises DataError: the file can't be read, has bad rows or no records, or needs too much memory for its size."""
    kept = Kept(str(path), kind.section, lambda: size_of_data(path))
    records: list[Record] = []
    num_bytes = 0
    stream = stream_of(kind, path, format, limit)
    for record in stream:
        records.append(record)
        num_bytes += record_bytes(*kind.parts(record))
        kept.require(len(records), num_bytes)
    return tuple(records), stream.report()
