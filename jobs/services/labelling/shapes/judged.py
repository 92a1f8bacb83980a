"""What an export is made of: items with their judgements, and the people who gave them as voters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, and_, exists, select

from jobs.services.labelling.agreement.given import RATED, given_in
from jobs.services.labelling.agreement.merging import Electorate, Pair, Vote, electorate, margins, ranked_pairs
from jobs.services.labelling.reviewing import withheld
from jobs.services.labelling.tables import items, judgements, people, reviews
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
    """An item (fields as in tables.py) and its judgements (person, name, client_id, answer, made_at, seconds), without
    those that were undone.

    Args:
        judges: those who judged, over all items of the store.
    """

    item: Any
    given: Sequence[Any]
    judges: Electorate

    @property
    def votes(self) -> list[Vote]:
        """By voter."""
        return self.judges.votes(self.item.id, ((row.person, row.answer) for row in self.given))

    def pairs(self) -> frozenset[Pair]:
        """Pairs of replies, the better one first: all judgements, merged."""
        return ranked_pairs(margins(self.votes, self.judges.weights))

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
IS_JUDGED = and_(
    items.c.gold.is_(None), exists().where(judgements.c.item == items.c.id, judgements.c.undone_at.is_(None))
)
"""Also if the only text was rejected, which counts for no judgement of its item."""


def of_items(shape: str, kinds: Sequence[str], write: Write) -> Rows:
    """The rows of all items of some kinds; items of others are counted."""

    def rows(connection: Connection, report: Exported) -> Iterator[Json]:
        for judged in every(connection, judges_of(connection), report):
            report.num_items += 1
            if judged.item.kind not in kinds:
                report.left_out[f"tasks to {judged.item.kind}, which {shape} does not hold"] += 1
                continue
            try:
                yield from write(judged, report)
            except LeftOut as reason:
                report.left_out[str(reason)] += 1

    return rows


def every(
    connection: Connection, judges: Electorate, report: Exported, ids: Sequence[int] | None = None
) -> Iterator[Judged]:
    """All judged items, or those of `ids`, without gold ones, and without texts that wait for reviews or were
    rejected, which are counted."""
    wanted = select(items).where(IS_JUDGED)
    if ids is not None:
        wanted = wanted.where(items.c.id.in_(ids))
    columns = (
        judgements.c.person,
        people.c.name,
        judgements.c.client_id,
        judgements.c.answer,
        judgements.c.made_at,
        judgements.c.seconds,
        reviews.c.item.label("review"),
        reviews.c.accepted,
    )
    for item in connection.execute(wanted.order_by(items.c.id)).yield_per(500):
        found = connection.execute(
            select(*columns)
            .join(people, judgements.c.person == people.c.id)
            .outerjoin(reviews, reviews.c.judgement == judgements.c.seq)
            .where(judgements.c.item == item.id, judgements.c.undone_at.is_(None))
            .order_by(judgements.c.seq)
        ).all()
        report.left_out.update(reason for row in found if (reason := withheld(row)) is not None)
        given = [row for row in found if withheld(row) is None]
        if given:
            yield Judged(item, given, judges)


def judges_of(connection: Connection) -> Electorate:
    """Those whose answers merge: all but texts."""
    return electorate(given_in(connection, ("rank", "compare", *RATED)))
