"""Description of a record format, common to all kinds of data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from orchestrator.data.messages import Fields
from orchestrator.data.rows.json_rows import Row

FieldSets = Sequence[frozenset[str]]
"""A row that has all fields of one of these sets has the format."""
Found = TypeVar("Found")


class LeftOut(Exception):
    """The row, or a part of it, is well formed but has no information. The message is the reason, which is counted."""


@dataclass(frozen=True)
class Format(Generic[Found]):
    """One record format.

    Args:
        fields: identify rows of this format.
        parse: yields the contents of a row, and a LeftOut for each part without information. Raises BadRow or LeftOut.
        consumed: fields that `parse` reads; a prompt's other fields become its meta.
        id_key: field with the record's id.
        gather: joins rows that belong together into one.
    """

    fields: FieldSets
    parse: Callable[[Fields], Iterable[Found | LeftOut]]
    consumed: frozenset[str] = frozenset()
    id_key: str = "id"
    gather: Callable[[Iterator[Row]], Iterator[Row]] | None = None


def field_sets(*names: str) -> FieldSets:
    """Sets of fields, each as one string: "prompt response", "prompt completion"."""
    return [frozenset(text.split()) for text in names]
