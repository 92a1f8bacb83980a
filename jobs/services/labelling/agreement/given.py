"""What people judged, as figures of agreement read it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from sqlalchemy import Connection, select

from jobs.services.labelling.tables import items, judgements, showings

RATED = ("rate", "review")  # kinds of tasks with a rating of one text


@dataclass(frozen=True)
class Given:
    """A judgement that was not undone; the answer and `gold` by index of the item's replies."""

    item: int
    person: int
    answer: Mapping[str, Any]
    order: Sequence[int]
    seconds: float
    gold: Mapping[str, Any] | None
    made_at: float = 0.0


def given_in(connection: Connection, kinds: Iterable[str] | None = None) -> list[Given]:
    """The judgements of the store, of these kinds of tasks or all, in the order in which they were made."""
    wanted = (
        select(
            judgements.c.item,
            judgements.c.person,
            judgements.c.answer,
            showings.c.order,
            judgements.c.seconds,
            items.c.gold,
            judgements.c.made_at,
        )
        .join(showings, judgements.c.showing == showings.c.id)
        .join(items, judgements.c.item == items.c.id)
        .where(judgements.c.undone_at.is_(None))
        .order_by(judgements.c.seq)
    )
    if kinds is not None:
        wanted = wanted.where(items.c.kind.in_(tuple(kinds)))
    return [Given(*row) for row in connection.execute(wanted)]


def by_item(given: Iterable[Given]) -> Mapping[int, list[Given]]:
    found: dict[int, list[Given]] = defaultdict(list)
    for each in given:
        found[each.item].append(each)
    return found


def ranks_of(answer: Mapping[str, Any]) -> Sequence[float | None] | None:
    """A number for each reply, a lower one is better; None: not rankable. None of an answer that orders no replies."""
    if answer["kind"] == "compare":
        return [answer["preference"], -answer["preference"]]
    ranks: Sequence[float | None] | None = answer.get("ranks")
    return ranks


def signs_of(answer: Mapping[str, Any]) -> tuple[int, ...]:
    """For each pair of replies 1 if the first is better, -1 if the second, 0 if neither. Empty: nothing is ordered."""
    ranks = ranks_of(answer) or ()
    signs = tuple(
        0 if rank is None or other is None else (other > rank) - (other < rank)
        for rank, other in combinations(ranks, 2)
    )
    return signs if any(signs) else ()
