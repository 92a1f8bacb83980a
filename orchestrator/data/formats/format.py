"""Description of a record format, common to all kinds of data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from orchestrator.data.json_rows import Row
from orchestrator.data.messages import Fields

FieldSets = Sequence[frozenset[str]]
"""A row with all fields of one of these sets is of the format."""
Found = TypeVar("Found")


class LeftOut(Exception):
    """The row, or a part of it, is well formed but teaches nothing; the message is the reason that is counted."""


@dataclass(frozen=True)
class Format(Generic[Found]):
    """How rows of one format are read.

    Args:
        fields: tells rows of this format from others.
        parse: what a row holds, and a LeftOut for each part that teaches nothing. Raises BadRow or LeftOut.
        consumed: fields that `parse` reads; a prompt's other fields become its meta.
        id_key: field with the id of what the row holds.
        gather: makes one row of several that belong together.
    """

    fields: FieldSets
    parse: Callable[[Fields], Iterable[Found | LeftOut]]
    consumed: frozenset[str] = frozenset()
    id_key: str = "id"
    gather: Callable[[Iterator[Row]], Iterator[Row]] | None = None


def field_sets(*names: str) -> FieldSets:
    """Sets of fields, each written as one text: "prompt response", "prompt completion"."""
    return [frozenset(text.split()) for text in names]
