"""Trees of messages as Open Assistant publishes them: kept whole, so that an export writes them with what people judged
(shapes/oasst.py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.data.formats.format import Format, LeftOut
from orchestrator.data.formats.oasst import OASST_FIELDS, Turn, oasst_turns, whole_trees
from orchestrator.data.formats.rankings import RANKING_FORMATS
from orchestrator.data.kinds import Kind, New
from orchestrator.data.messages import BadRow, Fields, text_of
from orchestrator.data.mixtures import is_mixture
from orchestrator.data.records import content_digest
from orchestrator.data.rows.files import is_text, read_rows

OASST = "oasst"
MAX_ID = 200


@dataclass(frozen=True)
class Tree:
    """A tree with the turns that are not deleted; `fields` is what the file holds."""

    id: str
    fields: Fields
    turns: Sequence[Turn]

    def asked(self) -> Iterator[Turn]:
        """The messages of a prompter, which replies can be written to."""
        return (turn for turn in self.turns if turn.path[-1].role == "user")


def holds_trees(path: Path, format: str) -> bool:
    """Whether a file is to be read as trees, or as the table of their messages. Raises DataError."""
    if format != "auto" or is_mixture(path) or is_text(path):
        return format == OASST and not is_mixture(path)
    first = next((row.fields for row in read_rows(path) if row.problem is None), {})
    fitting = (name for name, form in RANKING_FORMATS.items() if any(needed <= first.keys() for needed in form.fields))
    return next(fitting, None) == OASST


def _tree(fields: Fields, form: Format[Any]) -> Iterable[New[Tree] | LeftOut]:
    identity = text_of(fields, "message_tree_id")
    if len(identity) > MAX_ID:
        raise BadRow(f"'message_tree_id' is longer than {MAX_ID} characters")
    turns: list[Turn] = []
    for found in form.parse(fields):
        if isinstance(found, LeftOut):
            yield found
        else:
            turns.append(found)
    names = Counter(text_of(turn.node, "message_id") for turn in turns)
    if repeated := [name for name, count in names.items() if count > 1]:
        raise BadRow(f"message_id {repeated[0]!r} is in its tree twice")
    if turns and turns[0].path[0].role != "user":
        raise BadRow("the first message of a tree must be a prompter's")
    yield Tree(identity, fields, turns), content_digest(identity)


TREES = Kind[Tree](
    "preferences",
    {OASST: Format(OASST_FIELDS, oasst_turns, id_key="message_tree_id", gather=whole_trees)},
    _tree,
    lambda tree: (tree.turns,),
    lambda tree: dict(tree.fields),
)
