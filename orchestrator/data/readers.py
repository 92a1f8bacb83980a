"""Reads whole files of records. Every row is checked, and none is dropped silently (streams.py)."""

from __future__ import annotations

from pathlib import Path

from orchestrator.data.kinds import ANSWERED, DEMONSTRATIONS, DOCUMENTS, LABELS, PROMPTS, RANKINGS, SCORES, Kind, Record
from orchestrator.data.limits import Kept
from orchestrator.data.mixtures import is_mixture, sources_of, stream_of
from orchestrator.data.records import (
    DemonstrationRecord,
    DocumentRecord,
    LabelledRecord,
    PromptRecord,
    RankingRecord,
    ReadReport,
    ScoredRecord,
)
from orchestrator.data.rows.files import file_bytes


def read_prompts(
    path: str | Path, format: str = "auto", limit: int | None = None
) -> tuple[tuple[PromptRecord, ...], ReadReport]:
    """Reads prompts; of prompts with equal messages one is kept.

    Raises:
        DataError: the file can't be read, holds bad rows, or no prompt is left. The other readers raise it likewise.
    """
    return _read(PROMPTS, path, format, limit)


def read_answered(
    path: str | Path, format: str = "auto", limit: int | None = None
) -> tuple[tuple[PromptRecord, ...], ReadReport]:
    """Reads prompts with a reply in `meta` (kinds.reply_in); several may have the same prompt and id."""
    return _read(ANSWERED, path, format, limit)


def read_demonstrations(
    path: str | Path, format: str = "auto", limit: int | None = None
) -> tuple[tuple[DemonstrationRecord, ...], ReadReport]:
    """Reads conversations whose assistant turns are learned. A row may give several."""
    return _read(DEMONSTRATIONS, path, format, limit)


def read_rankings(
    path: str | Path, format: str = "auto", limit: int | None = None
) -> tuple[tuple[RankingRecord, ...], ReadReport]:
    """Reads preferences; a row may give several records, and several records may be about one prompt."""
    return _read(RANKINGS, path, format, limit)


def read_labels(
    path: str | Path, format: str = "auto", limit: int | None = None
) -> tuple[tuple[LabelledRecord, ...], ReadReport]:
    """Reads replies that were found good or bad."""
    return _read(LABELS, path, format, limit)


def read_scores(
    path: str | Path, format: str = "auto", limit: int | None = None
) -> tuple[tuple[ScoredRecord, ...], ReadReport]:
    """Reads scored replies. A score of 0 is a score; replies whose score is null are left out and counted."""
    return _read(SCORES, path, format, limit)


def read_documents(
    path: str | Path, format: str = "auto", limit: int | None = None
) -> tuple[tuple[DocumentRecord, ...], ReadReport]:
    """Reads texts that are learned as a whole."""
    return _read(DOCUMENTS, path, format, limit)


def _read(
    kind: Kind[Record], path: str | Path, format: str, limit: int | None
) -> tuple[tuple[Record, ...], ReadReport]:
    files = [source.path for source in sources_of(path)] if is_mixture(path) else [path]
    kept = Kept(str(path), kind.section, lambda: sum(map(file_bytes, files)))
    records: list[Record] = []
    stream = stream_of(kind, path, format, limit)
    for record in stream:
        records.append(record)
        kept.add(*kind.parts(record))
    return tuple(records), stream.report()
