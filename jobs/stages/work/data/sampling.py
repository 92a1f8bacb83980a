"""Samples of data files: one pass per file and process, however many checks and estimates ask for them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from jobs.prepare import find_data
from orchestrator.data.mixtures import MixedStream, stamp_of_data
from orchestrator.data.records import ReadReport
from orchestrator.data.streams import Stream
from orchestrator.errors import DataError
from orchestrator.prompts import Identified, marked_held_out
from orchestrator.training.ranking import thinned

MEASURED = 200  # records that stand for all
_KEPT = 8

Record = TypeVar("Record", bound=Identified)


def marked(
    records: Stream[Record] | MixedStream[Record], held_out: int | None, *, section: str
) -> Iterator[tuple[Record, bool]]:
    """Every record, and whether it is held out.

    Args:
        held_out: of `section`.

    Raises:
        DataError: reading, bad rows at its end, or none is left to train on.
    """

    def read() -> Iterator[Record]:
        yield from records
        records.report()

    return marked_held_out(read(), held_out, section=section)


def path_of(path: Path | None, made: Path | None, *, section: str, what: str) -> Path:
    """The file that a section names, otherwise the one that an earlier stage made. Raises DataError."""
    found = made if path is None else find_data(path)
    if found is None:
        raise DataError(f"{section}.path is null: give a file of {what}.")
    return found


@dataclass(frozen=True)
class Sampled(Generic[Record]):
    """At most MEASURED records, evenly spaced; the numbers of all records and of their replies. The report is of the
    whole file."""

    some: Sequence[Record]
    num_records: int
    num_replies: int
    report: ReadReport


_found: dict[Hashable, Sampled[Any]] = {}


def sample_file(
    path: Path,
    key: Hashable,
    records: Iterable[Record],
    report: Callable[[], ReadReport],
    num_replies: Callable[[Record], int] = lambda _: 1,
) -> Sampled[Record]:
    """Reads the records, unless this was done before.

    Args:
        path: the file. One that has changed is read again.
        key: what decides which records these are, besides the file.
        records: not iterated if they are known.
        report: called after reading.

    Raises:
        DataError: of reading.
    """
    whole = (key, str(path), stamp_of_data(path))
    if whole not in _found:
        count = replies = 0

        def counted() -> Iterator[Record]:
            nonlocal count, replies
            for record in records:
                count += 1
                replies += num_replies(record)
                yield record

        some = thinned(counted(), MEASURED)
        if len(_found) == _KEPT:
            _found.clear()
        _found[whole] = Sampled(some, count, replies, report())
    return _found[whole]
