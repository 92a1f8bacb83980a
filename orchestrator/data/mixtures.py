"""Mixtures: a YAML file in the place of a data file. It lists data files and how often their records are used.

    sources:
      - {path: chats.jsonl.gz, weight: 2}
      - {path: trees.jsonl.gz, format: oasst, weight: 0.5, limit: 1000}

A weight of 2 uses every record twice, one of 0.5 every second one, selected by a hash of its id. Ids get the name of
their source, so that those of different files stay distinct.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Generic

from pydantic import Field, ValidationError

from orchestrator.config.base import Positive, PositiveNumber, Section
from orchestrator.config.yaml_text import parse_yaml
from orchestrator.data.digests import Digests
from orchestrator.data.inputs import at_home, read_text
from orchestrator.data.kinds import Kind, Record
from orchestrator.data.records import ReadReport
from orchestrator.data.rows.files import file_bytes, file_stamp
from orchestrator.data.streams import Stream
from orchestrator.errors import DataError
from orchestrator.prompts import derive_seed

_ENDINGS = (".yaml", ".yml")


class Source(Section):
    path: Path
    """Data file; relative paths start at the folder of the mixture."""
    format: str | None = None
    """Record format. Null: as for the mixture."""
    weight: PositiveNumber = 1.0
    """Number of times that each record is used; below 1 the share of records that are used."""
    limit: Positive | None = None
    """Read at most this many records."""
    name: str | None = None
    """First part of the records' ids. Null: the file's name without its endings."""

    @property
    def prefix(self) -> str:
        return self.name or self.path.name.partition(".")[0]


class Mixture(Section):
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]


def is_mixture(path: str | Path) -> bool:
    return Path(path).suffix in _ENDINGS


def sources_of(path: str | Path) -> tuple[Source, ...]:
    """The sources of a mixture, with absolute paths.

    Raises:
        DataError: the file is not a mixture, or two sources have one name.
    """
    file = at_home(path, "the mixture", DataError)
    try:
        sources = Mixture.model_validate(parse_yaml(read_text(file, f"mixture {path}", DataError))).sources
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors()[:5])
        raise DataError(
            f"mixture {path}: {faults}. It holds sources: [{{path, format, weight, limit}}, ...]."
        ) from None
    except ValueError as error:
        raise DataError(f"mixture {path} is not YAML: {error}.") from None
    counts = Counter(source.prefix for source in sources)
    if repeated := [name for name, count in counts.items() if count > 1]:
        raise DataError(f"mixture {path}: several sources are called {repeated[0]!r}; give each a name of its own.")
    return tuple(source.model_copy(update={"path": _absolute(source.path, file)}) for source in sources)


def _absolute(path: Path, mixture: Path) -> Path:
    is_address = ":" in path.parts[0] or path.parts[0] == "~"
    return path if is_address else mixture.parent / path


def stream_of(
    kind: Kind[Record], path: str | Path, format: str = "auto", limit: int | None = None
) -> Stream[Record] | MixedStream[Record]:
    """The records of a data file or of a mixture."""
    return (MixedStream if is_mixture(path) else Stream)(kind, path, format, limit)


def size_of_data(path: str | Path) -> int:
    """Bytes of a data file, or of all files of a mixture."""
    return sum(map(file_bytes, _files(path)))


def stamp_of_data(path: str | Path) -> tuple[object, ...]:
    """Differs when a data file, or a mixture or one of its files, was changed."""
    return tuple(file_stamp(file) for file in (path, *_files(path)))


def _files(path: str | Path) -> Sequence[str | Path]:
    return [source.path for source in sources_of(path)] if is_mixture(path) else [path]


class MixedStream(Generic[Record]):
    """The records of a mixture: its sources take turns, one record each, so that a limit takes of all of them. Iterate
    once, then request the report.

    Raises:
        DataError: during reading, as Stream; or records of a kind with distinct ids are to be used several times.
    """

    def __init__(self, kind: Kind[Record], path: str | Path, format: str, limit: int | None) -> None:
        self._path, self._limit = str(path), limit
        self._sources = sources_of(path)
        seen = Digests()
        self._streams = [
            Stream(kind, source.path, source.format or format, source.limit, seen=seen) for source in self._sources
        ]
        self._num_records = self._num_unused = self._num_begun = 0
        for source in self._sources:
            if kind.has_distinct_ids and source.weight > 1:
                raise DataError(
                    f"mixture {path}: weight={source.weight:g} of {source.prefix!r} repeats {kind.section}, whose ids "
                    "are distinct; a weight is at most 1 here."
                )

    def __iter__(self) -> Iterator[Record]:
        turns = deque((source, iter(stream)) for source, stream in zip(self._sources, self._streams, strict=True))
        while turns:
            source, stream = turns.popleft()
            self._num_begun = min(self._num_begun + 1, len(self._sources))
            record = next(stream, None)
            if record is None:
                continue
            turns.append((source, stream))
            for _ in range(self._num_copies(source, record)):
                yield _renamed(record, source.prefix)
                self._num_records += 1
                if self._num_records == self._limit:
                    return

    def report(self) -> ReadReport:
        """The report after reading. Raises DataError if a source that was read had bad rows or no record."""
        reports = [stream.report() for stream in self._streams[: self._num_begun]]
        left_out = Counter[str]()
        for found in reports:
            left_out.update(found.left_out)
        if self._num_unused:
            left_out["records by weight"] = self._num_unused
        parts = (
            f"{source.weight:g} x {source.prefix} ({found.format})"
            for source, found in zip(self._sources, reports, strict=False)
        )
        num_rows = sum(found.num_rows for found in reports)
        return ReadReport(self._path, " + ".join(parts), num_rows, self._num_records, dict(left_out))

    def _num_copies(self, source: Source, record: Any) -> int:
        whole, share = divmod(source.weight, 1.0)
        count = int(whole) + (derive_seed("mixture", source.prefix, record.id) / 2**63 < share)
        self._num_unused += not count
        return count


def _renamed(record: Any, prefix: str) -> Any:
    return replace(record, id=f"{prefix}:{record.id}")
