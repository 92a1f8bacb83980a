"""How well each person judges: agreement with others and with known answers, time, habits of place."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from sqlalchemy import Connection, select

from jobs.services.labelling.merging import votes_of
from jobs.services.labelling.tables import LABELLER, items, judgements, people, showings
from orchestrator.training.ranking import wilson_interval

_GUESSING = 0.5  # of votes agree
_GOOD = 0.75  # agreement from which on nobody is suspected


@dataclass(frozen=True)
class Figures:
    """A person's figures. None: too little is known.

    Args:
        num: judgements.
        seconds: median per judgement, as the page measured.
        with_others, with_gold: mean Kendall tau-b to the other judgements of an item, and to known answers.
        agreed, given: votes on pairs that agree with others or gold, and their number; a tie is half.
        first_share: share of judgements whose best reply was shown at the first place.
    """

    name: str
    num: int
    seconds: float | None
    with_others: float | None
    with_gold: float | None
    agreed: float
    given: int
    first_share: float | None

    @property
    def spam(self) -> float:
        return spam_score(self.agreed, self.given)


def kendall_tau(first: Sequence[float | None], second: Sequence[float | None]) -> float | None:
    """Kendall's tau-b of two rankings of the same replies, which may have ties; a reply that one of them leaves out
    does not count. None: one of them orders nothing (Kendall 1945)."""
    both = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    signs = [(_sign(a[0], b[0]), _sign(a[1], b[1])) for a, b in combinations(both, 2)]
    one, two = sum(sign != 0 for sign, _ in signs), sum(sign != 0 for _, sign in signs)
    return sum(a * b for a, b in signs) / math.sqrt(one * two) if one and two else None


def spam_score(agreed: float, given: int) -> float:
    """0 to 1: how far the agreement of a person's votes is from that of a careful one, at best. The upper end of its
    95 % interval is 1/2 or less for a score of 1; 0.75 or more for a score of 0, as for few votes."""
    _, highest = wilson_interval(agreed, given)
    return min(1.0, max(0.0, (_GOOD - highest) / (_GOOD - _GUESSING)))


def figures(connection: Connection) -> list[Figures]:
    """Of all labellers, by name."""
    rows = connection.execute(
        select(judgements, showings.c.order, items.c.gold)
        .join(showings, judgements.c.showing == showings.c.id)
        .join(items, judgements.c.item == items.c.id)
        .where(judgements.c.undone_at.is_(None))
    ).all()
    by_item: dict[int, list[Any]] = defaultdict(list)
    by_person: dict[int, list[Any]] = defaultdict(list)
    for row in rows:
        by_item[row.item].append(row)
        by_person[row.person].append(row)
    names = connection.execute(select(people.c.id, people.c.name).where(people.c.role == LABELLER)).all()
    return [_figures(name, by_person[person], by_item) for person, name in sorted(names, key=lambda each: each[1])]


def lines(connection: Connection) -> Iterator[str]:
    """A table for the console."""
    yield f"{'name':<24}{'judged':>8}{'seconds':>9}{'others':>8}{'gold':>7}{'spam':>6}"
    for each in figures(connection):
        shown = [_shown(value) for value in (each.seconds, each.with_others, each.with_gold, each.spam)]
        yield f"{each.name:<24}{each.num:>8}{shown[0]:>9}{shown[1]:>8}{shown[2]:>7}{shown[3]:>6}"


def _figures(name: str, rows: Sequence[Any], by_item: Mapping[int, Sequence[Any]]) -> Figures:
    others: list[float] = []
    golds: list[float] = []
    firsts: list[bool] = []
    agreed, given = 0.0, 0
    for row in rows:
        ranks = _ranks(row.answer)
        if ranks is None:
            continue
        compared = [(other.answer, others) for other in by_item[row.item] if other.person != row.person]
        if row.gold is not None:
            compared = [(row.gold, golds)]
        for answer, kept in compared:
            tau = kendall_tau(ranks, _ranks(answer) or [])
            if tau is not None:
                kept.append(tau)
            found, number = _agreement(row.answer, answer)
            agreed, given = agreed + found, given + number
        known = [rank for rank in ranks if rank is not None]
        if known and known.count(min(known)) == 1:
            firsts.append(ranks[row.order[0]] == min(known))
    return Figures(
        name,
        len(rows),
        statistics.median(row.seconds for row in rows) if rows else None,
        statistics.fmean(others) if others else None,
        statistics.fmean(golds) if golds else None,
        agreed,
        given,
        statistics.fmean(firsts) if firsts else None,
    )


def _ranks(answer: Mapping[str, Any]) -> Sequence[float | None] | None:
    if answer["kind"] == "compare":
        return [answer["preference"], -answer["preference"]]
    ranks: Sequence[float | None] | None = answer.get("ranks")
    return ranks


def _agreement(answer: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, int]:
    """Votes that agree, and votes on the same pairs where the other one is no tie."""
    theirs = {(vote.first, vote.second): vote.first_is_better for vote in votes_of(0, 0, other)}
    agreed, given = 0.0, 0
    for vote in votes_of(0, 0, answer):
        known = theirs.get((vote.first, vote.second), 0.5)
        if known != 0.5:
            given += 1
            agreed += 1 - abs(vote.first_is_better - known)
    return agreed, given


def _sign(first: float, second: float) -> int:
    return (first > second) - (first < second)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
