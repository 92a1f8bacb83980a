"""How well people judge: agreement with others and with known answers, reliability, time, habits of place."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, select

from jobs.services.labelling.agreement.alpha import alphas
from jobs.services.labelling.agreement.copies import Copy, Voters
from jobs.services.labelling.agreement.given import Given, by_item, given_in, ranks_of
from jobs.services.labelling.agreement.merging import Electorate, electorate, votes_of
from jobs.services.labelling.agreement.rating import Rater
from jobs.services.labelling.tables import LABELLER, people
from orchestrator.training import ranking
from orchestrator.training.ranking import wilson_interval

_GUESSING = 0.5  # of votes are right
_GOOD = 0.75  # reliability from which on nobody is suspected
_COLUMNS = {"seconds": 9, "with_others": 8, "with_gold": 7, "reliability": 7, "ratings": 9, "reviews": 9, "spam": 6}
SPAM = 0.5  # score from which on a person is named a spammer


@dataclass(frozen=True)
class Figures:
    """A person's figures. None: too little is known.

    Args:
        num: judgements.
        seconds: median per judgement, as the page measured.
        with_others, with_gold: mean Kendall tau-b to the other judgements of an item, and to known answers.
        agreement: share of votes on pairs that agree with others or gold; a tie is half.
        reliability: estimated probability of a vote to be right, by which merging weighs it.
        ratings: mean correlation of ratings and reviews with those of others of the same texts.
        reviews: share of reviews that reject or accept as the majority of the others does.
        num_compared: judgements for which there are others, or gold.
        first_share: share of judgements whose best reply was shown at the first place.
        copy_of: somebody, or several, with the same answers. All of them count as one voter, and are not compared with
            each other. Nobody can see from answers alone which of them copied.
        copy_first: share of the rankings in common with those that this person gave first.
    """

    name: str
    num: int
    seconds: float | None
    with_others: float | None
    with_gold: float | None
    agreement: float | None
    reliability: float | None
    ratings: float | None
    reviews: float | None
    rater_spam: float | None
    num_compared: int
    first_share: float | None
    copy_of: str | None
    copy_first: float | None

    @property
    def spam(self) -> float | None:
        """The higher one of what pairs and ratings say."""
        by_pairs = None if self.reliability is None else spam_score(self.reliability, self.num_compared)
        return max((score for score in (by_pairs, self.rater_spam) if score is not None), default=None)


def kendall_tau(first: Sequence[float | None], second: Sequence[float | None]) -> float | None:
    """Kendall's tau-b of two rankings of the same replies, which may have ties; a reply that one of them leaves out
    does not count. None: one of them orders nothing (Kendall 1945)."""
    both = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    return ranking.kendall_tau([a for a, _ in both], [b for _, b in both])


def spam_score(reliability: float, num: int) -> float:
    """0 to 1: how far a person's votes are from those of a careful one, at best. The upper end of the 95 % interval of
    their reliability is 1/2 or less for a score of 1; 0.75 or more for a score of 0, as for few judgements.

    Args:
        num: judgements that could be compared. Votes of one judgement depend on each other, so they count as one.
    """
    _, highest = wilson_interval(reliability * num, num)
    return min(1.0, max(0.0, (_GOOD - highest) / (_GOOD - _GUESSING)))


def report(connection: Connection) -> dict[str, Any]:
    """All figures, as JSON has them.

    Returns:
        people: of each labeller the fields of Figures, `spam`, `paused` and `revoked`; by name.
        alpha: by kind of task Krippendorff's alpha as `value`, and `num_items` that several people judged.
    """
    given, states = given_in(connection), _states(connection)
    judges = electorate(given)
    found = figures_of(given, {person: state.name for person, state in states.items()}, judges)
    paused = {
        state.name: {"paused": state.paused, "revoked": state.revoked_at is not None} for state in states.values()
    }
    return {
        "people": [{**asdict(each), "spam": each.spam, **paused[each.name]} for each in found],
        "alpha": {kind: asdict(alpha) for kind, alpha in alphas(judges.voters.once(given)).items()},
    }


def figures(connection: Connection) -> list[Figures]:
    """Of all labellers, by name."""
    return figures_of(given_in(connection), {person: state.name for person, state in _states(connection).items()})


def figures_of(given: Sequence[Given], names: Mapping[int, str], judges: Electorate | None = None) -> list[Figures]:
    """Of the people in `names` (by id), by name. `judges`: the electorate of `given`, if it is known."""
    judges = judges or electorate(given)
    items = by_item(given)
    by_person: dict[int, list[Given]] = {person: [] for person in names}
    for each in given:
        by_person.setdefault(each.person, []).append(each)
    return [
        _figures(person, names, by_person[person], items, judges)
        for person in sorted(names, key=lambda person: names[person])
    ]


def lines(connection: Connection) -> Iterator[str]:
    """A table for the console, and Krippendorff's alpha."""
    found = report(connection)
    heads = {"with_others": "others", "with_gold": "gold", "reliability": "right"}
    shown = "".join(f"{heads.get(name, name):>{width}}" for name, width in _COLUMNS.items())
    yield f"{'name':<24}{'judged':>8}{shown}"
    for each in found["people"]:
        shown = "".join(f"{_shown(each[name]):>{width}}" for name, width in _COLUMNS.items())
        copied = f"  same answers as {each['copy_of']}, {each['copy_first']:.0%} first" if each["copy_of"] else ""
        yield f"{each['name']:<24}{each['num']:>8}{shown}{copied}"
    for kind, alpha in found["alpha"].items():
        if alpha["num_items"]:
            several = f"{alpha['num_items']} items of several people"
            yield f"Krippendorff's alpha, {kind}: {_shown(alpha['value'])} ({several})"


def _states(connection: Connection) -> Mapping[int, Any]:
    found = connection.execute(
        select(people.c.id, people.c.name, people.c.paused, people.c.revoked_at).where(people.c.role == LABELLER)
    )
    return {row.id: row for row in found}


def _figures(
    person: int,
    names: Mapping[int, str],
    rows: Sequence[Given],
    items: Mapping[int, Sequence[Given]],
    judges: Electorate,
) -> Figures:
    compared = _Compared()
    firsts: list[bool] = []
    for row in rows:
        ranks = ranks_of(row.answer)
        if ranks is not None:
            compared.add(row, ranks, _others(row, items, judges.voters))
            known = [rank for rank in ranks if rank is not None]
            if known and known.count(min(known)) == 1:
                firsts.append(ranks[row.order[0]] == min(known))
    copy = judges.voters.copies.get(person)
    rater = judges.raters.get(person, Rater())
    return Figures(
        names[person],
        len(rows),
        statistics.median(row.seconds for row in rows) if rows else None,
        statistics.fmean(compared.with_others) if compared.with_others else None,
        statistics.fmean(compared.with_gold) if compared.with_gold else None,
        compared.agreed / compared.given if compared.given else None,
        judges.reliability.get(judges.voters.of(person)) if compared.num else None,
        rater.with_others,
        rater.with_majority,
        None if rater.reliability is None else spam_score(rater.reliability, round(rater.evidence)),
        compared.num,
        statistics.fmean(firsts) if firsts else None,
        _named(copy, names),
        None if copy is None else copy.first_share,
    )


class _Compared:
    """One person's answers beside gold, or else those of others."""

    def __init__(self) -> None:
        self.with_others: list[float] = []
        self.with_gold: list[float] = []
        self.agreed, self.given, self.num = 0.0, 0, 0

    def add(self, row: Given, ranks: Sequence[float | None], others: Sequence[Mapping[str, Any]]) -> None:
        kept = self.with_others if row.gold is None else self.with_gold
        before = self.given
        for answer in others if row.gold is None else [row.gold]:
            tau = kendall_tau(ranks, ranks_of(answer) or [])
            if tau is not None:
                kept.append(tau)
            found, number = _agreement(row.answer, answer)
            self.agreed, self.given = self.agreed + found, self.given + number
        self.num += self.given > before


def _others(row: Given, items: Mapping[int, Sequence[Given]], voters: Voters) -> list[Mapping[str, Any]]:
    """The answers of other voters to the same item."""
    me = voters.of(row.person)
    return [other.answer for other in items[row.item] if voters.of(other.person) != me]


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


def _named(copy: Copy | None, names: Mapping[int, str]) -> str | None:
    return None if copy is None else ", ".join(sorted(names[other] for other in copy.of if other in names)) or None


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
