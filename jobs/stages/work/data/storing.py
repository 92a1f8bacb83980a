"""Writes records as rows of tokens while they are read: memory holds few of them (docs/adr/0014-rows-on-disk.md)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Generic, Protocol, TypeVar

import pyarrow as pa

from actors.training.stored_rows import RowsWriter, writing_rows
from jobs.stages.stage import Say

APPENDED_ROWS = 1024  # are held before they are written
SAID_S = 30.0  # between two lines about a long file


class Tokens(Protocol):
    """Makes rows of tokens of records, and counts what does not fit."""

    @property
    def added(self) -> Sequence[str]:
        """Columns beside those of all rows, see stored_rows.py."""
        ...

    def add(self, record: Any, /) -> None:
        """Raises DataError: the chat template refuses it."""
        ...

    def __len__(self) -> int:
        """Number of rows since the last `take`."""
        ...

    def take(self) -> pa.Table:
        """These rows."""
        ...


Made = TypeVar("Made", bound=Tokens)


@dataclass
class Stored(Generic[Made]):
    """Records as rows of tokens in a folder (stored_rows.py). `tokens` counts what did not fit."""

    folder: Path
    writer: RowsWriter
    tokens: Made
    num_records: int = 0

    def append(self) -> None:
        self.writer.append(self.tokens.take())


async def store(
    records: Iterable[tuple[Any, bool]], tokens: tuple[Made, Made], folder: Path, say: Say, *, what: str
) -> tuple[Stored[Made], Stored[Made]]:
    """Writes the rows to train on, and those held out.

    Args:
        records: each with whether it is held out.
        tokens: for the records to train on, and for those held out.
        what: name of the records, for lines about a long file.

    Raises:
        DataError: reading, or a record that the chat template refuses.
        StorageError: writing.
    """
    said = monotonic()
    with ExitStack() as stack:
        parts = []
        for name, made in zip(("train", "held_out"), tokens, strict=True):
            place = folder / name
            parts.append(Stored(place, stack.enter_context(writing_rows(place, *made.added)), made))
        for record, is_held_out in records:
            part = parts[is_held_out]
            part.num_records += 1
            part.tokens.add(record)
            if len(part.tokens) >= APPENDED_ROWS:
                part.append()
                await asyncio.sleep(0)  # a stop is noticed here
                if monotonic() - said > SAID_S:
                    said = monotonic()
                    say(f"{what}: {sum(part.num_records for part in parts):,} written as tokens ...")
        for part in parts:
            part.append()
    train, held_out = parts
    return train, held_out
