"""What an export is made of: items with their judgements, and the weights of the people who gave them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Row, select

from jobs.services.labelling.merging import Pair, Vote, margins, ranked_pairs, reliabilities, votes_of, weight
from jobs.services.labelling.tables import items, judgements, people
from orchestrator.data.formats.format import LeftOut

Json = dict[str, Any]


@dataclass
class Exported:
    """`left_out`: what makes no row, or is not in its row, by reason."""

    num_items: int = 0
    num_rows: int = 0
    left_out: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Judged:
    """An item and its judgements (person, name, client_id, answer, made_at, seconds), without those that were undone.

    Args:
        weights: of the votes of each person.
    """

    item: Row[Any]
    given: Sequence[Any]
    weights: Mapping[int, float]

    @property
    def votes(self) -> list[Vote]:
        return [vote for row in self.given for vote in votes_of(self.item.id, row.person, row.answer)]

    def pairs(self) -> frozenset[Pair]:
        """Pairs of replies, the better one first: all judgements, merged."""
        return ranked_pairs(margins(self.votes, self.weights))

    def order(self) -> frozenset[Pair]:
        """As `pairs`. Raises LeftOut: there are none."""
        found = self.pairs()
        if not found:
            raise LeftOut("without a preference")
        return found

    def replies(self) -> list[Any]:
        return [each["reply"] for each in self.item.replies]


Rows = Callable[[Connection, Exported], Iterator[Json]]
Write = Callable[[Judged, Exported], Iterator[Json]]
"""Rows of one item. Raises LeftOut, before the first of them."""


def of_items(shape: str, kinds: Sequence[str], write: Write) -> Rows:
    """The rows of all items of some kinds; items of others are counted."""

    def rows(connection: Connection, report: Exported) -> Iterator[Json]:
        for judged in every(connection, weights_of(connection)):
            report.num_items += 1
            if judged.item.kind not in kinds:
                report.left_out[f"tasks to {judged.item.kind}, which {shape} does not hold"] += 1
                continue
            try:
                yield from write(judged, report)
            except LeftOut as reason:
                report.left_out[str(reason)] += 1

    return rows


def every(connection: Connection, weights: Mapping[int, float], ids: Sequence[int] | None = None) -> Iterator[Judged]:
    """All judged items, or those of `ids`, without gold ones."""
    wanted = select(items).where(items.c.gold.is_(None), items.c.num_judgements > 0)
    if ids is not None:
        wanted = wanted.where(items.c.id.in_(ids))
    columns = (
        judgements.c.person,
        people.c.name,
        judgements.c.client_id,
        judgements.c.answer,
        judgements.c.made_at,
        judgements.c.seconds,
    )
    for item in connection.execute(wanted.order_by(items.c.id)).yield_per(500):
        given = connection.execute(
            select(*columns)
            .join(people, judgements.c.person == people.c.id)
            .where(judgements.c.item == item.id, judgements.c.undone_at.is_(None))
            .order_by(judgements.c.seq)
        ).all()
        yield Judged(item, given, weights)


def weights_of(connection: Connection) -> Mapping[int, float]:
    """The weight of each person's votes."""
    return {person: weight(found) for person, found in reliabilities_of(connection).items()}


def reliabilities_of(connection: Connection) -> Mapping[int, float]:
    """The reliability of each person who has ranked or compared, over all items of the store."""
    found = connection.execute(
        select(judgements.c.item, judgements.c.person, judgements.c.answer, items.c.gold)
        .join(items)
        .where(judgements.c.undone_at.is_(None), items.c.kind.in_(("rank", "compare")))
    ).all()
    known = {row.item: row.gold for row in found if row.gold is not None}
    gold = {
        (vote.item, vote.first, vote.second): vote.first_is_better
        for item, answer in known.items()
        for vote in votes_of(item, 0, answer)
    }
    return reliabilities((vote for row in found for vote in votes_of(row.item, row.person, row.answer)), gold)
