"""Samples of data files: one pass per file and process, however many checks and estimates ask for them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from orchestrator.data.mixtures import stamp_of_data
from orchestrator.data.records import ReadReport
from orchestrator.training.ranking import thinned

MEASURED = 200  # records that stand for all
_KEPT = 8

Record = TypeVar("Record")


@dataclass(frozen=True)
class Sampled(Generic[Record]):
    """At most MEASURED records, evenly spaced; the numbers of all records and of their replies. The report is of the
    whole file."""

    some: Sequence[Record]
    num_records: int
    num_replies: int
    report: ReadReport


_found: dict[Hashable, Sampled[object]] = {}


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
    return _found[whole]  # type: ignore[return-value]
