"""How well each person judges: agreement with others and with known answers, time, habits of place."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from sqlalchemy import Connection, select

from jobs.services.labelling.merging import votes_of
from jobs.services.labelling.tables import LABELLER, items, judgements, people, showings
from orchestrator.training import ranking
from orchestrator.training.ranking import wilson_interval

_GUESSING = 0.5  # of votes agree
_GOOD = 0.75  # agreement from which on nobody is suspected
_COPIED = 0.85  # share of the same rankings that careful people do not reach
_MIN_REPLIES = 3  # rankings of fewer are the same by chance


@dataclass(frozen=True)
class Given:
    """A judgement that was not undone; the answer and `gold` by index of the item's replies."""

    item: int
    person: int
    answer: Mapping[str, Any]
    order: Sequence[int]
    seconds: float
    gold: Mapping[str, Any] | None


@dataclass(frozen=True)
class Figures:
    """A person's figures. None: too little is known.

    Args:
        num: judgements.
        seconds: median per judgement, as the page measured.
        with_others, with_gold: mean Kendall tau-b to the other judgements of an item, and to known answers.
        agreement: share of votes on pairs that agree with others or gold; a tie is half.
        num_compared: judgements for which there are others, or gold.
        first_share: share of judgements whose best reply was shown at the first place.
        copy_of: somebody with the same answers. Nobody can see from answers alone which of the two copied.
    """

    name: str
    num: int
    seconds: float | None
    with_others: float | None
    with_gold: float | None
    agreement: float | None
    num_compared: int
    first_share: float | None
    copy_of: str | None

    @property
    def spam(self) -> float:
        return 0.0 if self.agreement is None else spam_score(self.agreement, self.num_compared)


def kendall_tau(first: Sequence[float | None], second: Sequence[float | None]) -> float | None:
    """Kendall's tau-b of two rankings of the same replies, which may have ties; a reply that one of them leaves out
    does not count. None: one of them orders nothing (Kendall 1945)."""
    both = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    return ranking.kendall_tau([a for a, _ in both], [b for _, b in both])


def spam_score(agreement: float, num: int) -> float:
    """0 to 1: how far a person's votes are from those of a careful one, at best. The upper end of the 95 % interval of
    their agreement is 1/2 or less for a score of 1; 0.75 or more for a score of 0, as for few judgements.

    Args:
        num: judgements that could be compared. Votes of one judgement depend on each other, so they count as one.
    """
    _, highest = wilson_interval(agreement * num, num)
    return min(1.0, max(0.0, (_GOOD - highest) / (_GOOD - _GUESSING)))


def figures(connection: Connection) -> list[Figures]:
    """Of all labellers, by name."""
    rows = connection.execute(
        select(
            judgements.c.item,
            judgements.c.person,
            judgements.c.answer,
            showings.c.order,
            judgements.c.seconds,
            items.c.gold,
        )
        .join(showings, judgements.c.showing == showings.c.id)
        .join(items, judgements.c.item == items.c.id)
        .where(judgements.c.undone_at.is_(None))
    )
    names = connection.execute(select(people.c.id, people.c.name).where(people.c.role == LABELLER))
    return figures_of([Given(*row) for row in rows], {row.id: row.name for row in names})


def figures_of(given: Sequence[Given], names: Mapping[int, str]) -> list[Figures]:
    """Of the people in `names` (by id), by name."""
    by_item: dict[int, list[Given]] = defaultdict(list)
    by_person: dict[int, list[Given]] = defaultdict(list)
    for each in given:
        by_item[each.item].append(each)
        by_person[each.person].append(each)
    copies = _copies(by_item)
    return [
        _figures(name, by_person[person], by_item, names.get(copies.get(person, -1)))
        for person, name in sorted(names.items(), key=lambda entry: entry[1])
    ]


def _copies(by_item: Mapping[int, Sequence[Given]]) -> Mapping[int, int]:
    """People whose answers are those of another person, and that person."""
    same, common = Counter[tuple[int, int]](), Counter[tuple[int, int]]()
    for given in by_item.values():
        for first, second in combinations(given, 2):
            if len(first.order) >= _MIN_REPLIES:
                pair = (first.person, second.person)
                for either in (pair, pair[::-1]):
                    common[either] += 1
                    same[either] += first.answer == second.answer
    return {
        person: other
        for (person, other), count in common.items()
        if wilson_interval(same[person, other], count)[0] > _COPIED
    }


def lines(connection: Connection) -> Iterator[str]:
    """A table for the console."""
    yield f"{'name':<24}{'judged':>8}{'seconds':>9}{'others':>8}{'gold':>7}{'spam':>6}"
    for each in figures(connection):
        shown = [_shown(value) for value in (each.seconds, each.with_others, each.with_gold, each.spam)]
        copied = f"  same answers as {each.copy_of}" if each.copy_of else ""
        yield f"{each.name:<24}{each.num:>8}{shown[0]:>9}{shown[1]:>8}{shown[2]:>7}{shown[3]:>6}{copied}"


def _figures(name: str, rows: Sequence[Given], by_item: Mapping[int, Sequence[Given]], copy_of: str | None) -> Figures:
    others: list[float] = []
    golds: list[float] = []
    firsts: list[bool] = []
    agreed, given, num_compared = 0.0, 0, 0
    for row in rows:
        ranks = _ranks(row.answer)
        if ranks is None:
            continue
        compared = [(other.answer, others) for other in by_item[row.item] if other.person != row.person]
        if row.gold is not None:
            compared = [(row.gold, golds)]
        before = given
        for answer, kept in compared:
            tau = kendall_tau(ranks, _ranks(answer) or [])
            if tau is not None:
                kept.append(tau)
            found, number = _agreement(row.answer, answer)
            agreed, given = agreed + found, given + number
        num_compared += given > before
        known = [rank for rank in ranks if rank is not None]
        if known and known.count(min(known)) == 1:
            firsts.append(ranks[row.order[0]] == min(known))
    return Figures(
        name,
        len(rows),
        statistics.median(row.seconds for row in rows) if rows else None,
        statistics.fmean(others) if others else None,
        statistics.fmean(golds) if golds else None,
        agreed / given if given else None,
        num_compared,
        statistics.fmean(firsts) if firsts else None,
        copy_of,
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


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
