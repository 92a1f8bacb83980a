"""The table of shapes: name, how rows are made, and how they lie in the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from jobs.services.labelling.shapes import own, published
from jobs.services.labelling.shapes.argilla import argilla
from jobs.services.labelling.shapes.judged import Rows, Write, of_items
from jobs.services.labelling.shapes.label_studio import label_studio
from jobs.services.labelling.shapes.oasst import oasst


@dataclass(frozen=True)
class Shape:
    """Args:
    is_array: the file is one JSON array, not a row per line.
    is_ascii: other characters are escaped, as in the files of Open Assistant.
    """

    rows: Rows
    is_array: bool = False
    is_ascii: bool = False

    @property
    def suffix(self) -> str:
        """Of a file's name."""
        return "json" if self.is_array else "jsonl"

    @property
    def media_type(self) -> str:
        return "application/json" if self.is_array else "application/x-ndjson"


_ALL = ("rank", "compare", "rate", "write")


def _shape(name: str, kinds: Sequence[str], write: Write, *, is_array: bool = False) -> Shape:
    return Shape(of_items(name, kinds, write), is_array)


SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "rankings": _shape("rankings", ("rank", "compare"), own.rankings),
        "scores": _shape("scores", ("rate",), own.scores),
        "demonstrations": Shape(own.demonstrations),
        "prompts": Shape(own.prompts),
        "judgements": Shape(own.every_judgement),
        "oasst": Shape(oasst, is_ascii=True),
        "hh-rlhf": _shape("hh-rlhf", ("rank", "compare"), published.hh_rlhf),
        "ultrafeedback": Shape(published.ultrafeedback),
        "helpsteer2": _shape("helpsteer2", ("rate",), published.helpsteer2),
        "helpsteer3": _shape("helpsteer3", ("compare",), published.helpsteer3),
        "arena": _shape("arena", ("rank", "compare"), published.arena_votes),
        "argilla": _shape("argilla", _ALL, argilla, is_array=True),
        "label-studio": _shape("label-studio", _ALL, label_studio, is_array=True),
    }
)
