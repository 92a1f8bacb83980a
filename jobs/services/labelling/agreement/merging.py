"""Merges the rankings of several people: reliabilities of people, then ranked pairs for each item.

A vote is one person's opinion on two replies of an item.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.special import expit

from jobs.services.labelling.agreement.copies import Voters, voters
from jobs.services.labelling.agreement.given import Given
from jobs.services.labelling.agreement.rating import Rater, raters

Pair = tuple[int, int]  # of replies; where there is an order, the first is better
_MAX_ROUNDS = 100
_CHANGE = 1e-6
_PRIOR_RIGHT, _PRIOR_WRONG = 8.0, 2.0  # votes that everybody is credited with
_CERTAIN = 0.99  # no one counts as more reliable


@dataclass(frozen=True, slots=True)
class Vote:
    """`first_is_better`: 1, 0, or 1/2 for a tie; between them for several people who count as one. `first` < `second`
    are indices of an item's replies."""

    item: int
    person: int
    first: int
    second: int
    first_is_better: float


def votes_of(item: int, person: int, answer: Mapping[str, Any]) -> Iterator[Vote]:
    """The votes of an answer to rank or compare; a reply that is not rankable takes part in none."""
    if answer["kind"] == "compare":
        yield Vote(item, person, 0, 1, _better(answer["preference"], 0))
    elif answer["kind"] == "rank":
        for (first, rank), (second, other) in itertools.combinations(enumerate(answer["ranks"]), 2):
            if rank is not None and other is not None:
                yield Vote(item, person, first, second, _better(rank, other))


def opinions(answer: Mapping[str, Any]) -> Mapping[Pair, float]:
    """`first_is_better` of an answer's votes, by the two replies."""
    return {(vote.first, vote.second): vote.first_is_better for vote in votes_of(0, 0, answer)}


def agreements(given: Sequence[Mapping[Pair, float]]) -> Iterator[float]:
    """For every two people and every pair of replies on which both have an opinion: 1 if they agree, 0 if not. A tie
    agrees by half with a preference, and wholly with another tie."""
    for one, other in itertools.combinations(given, 2):
        yield from (1.0 - abs(one[pair] - other[pair]) for pair in one if pair in other)


def _better(rank: float, other: float) -> float:
    return 1.0 if rank < other else 0.0 if rank > other else 0.5


@dataclass(frozen=True)
class Electorate:
    """Who votes, and how reliable they are. `reliability`: by voter; people with the same answers are one. `raters`: by
    person, of those who rated or reviewed."""

    voters: Voters
    reliability: Mapping[int, float]
    raters: Mapping[int, Rater] = field(default_factory=dict)

    @property
    def weights(self) -> Mapping[int, float]:
        """By voter."""
        return {voter: weight(found) for voter, found in self.reliability.items()}

    def rating_weight(self, person: int) -> float:
        """Of a person's ratings. People about whom nothing is known have that of the prior."""
        found = self.raters.get(person, Rater())
        right = 0.0 if found.reliability is None else found.reliability * found.evidence
        num = 0.0 if found.reliability is None else found.evidence
        return weight((right + _PRIOR_RIGHT) / (num + _PRIOR_RIGHT + _PRIOR_WRONG))

    def votes(self, item: int, answers: Iterable[tuple[int, Mapping[str, Any]]]) -> list[Vote]:
        """The votes on an item, by voter. `answers`: (person, answer)."""
        return joined((vote for person, answer in answers for vote in votes_of(item, person, answer)), self.voters.of)


def electorate(given: Sequence[Given]) -> Electorate:
    """Of all judgements of a store: reliabilities are those over all items."""
    found = voters(given)
    votes = joined((vote for each in given for vote in votes_of(each.item, each.person, each.answer)), found.of)
    known = {each.item: each.gold for each in given if each.gold is not None}
    gold = {
        (item, vote.first, vote.second): vote.first_is_better
        for item, answer in known.items()
        for vote in votes_of(item, 0, answer)
    }
    return Electorate(found, reliabilities(votes, gold), raters(given, found))


def joined(votes: Iterable[Vote], voter: Callable[[int], int]) -> list[Vote]:
    """Several people who count as one voter have one vote on each pair, the mean of theirs.

    Args:
        voter: the voter that a person counts as.
    """
    opinions: dict[tuple[int, int, int, int], list[float]] = defaultdict(list)
    for vote in votes:
        opinions[vote.item, voter(vote.person), vote.first, vote.second].append(vote.first_is_better)
    return [Vote(*place, statistics.fmean(found)) for place, found in opinions.items()]


def reliabilities(votes: Iterable[Vote], gold: Mapping[tuple[int, int, int], float]) -> Mapping[int, float]:
    """The probability of each person's votes to be right, by expectation maximisation (Dawid and Skene 1979, one
    parameter per person).

    Pairs on which only one person voted say nothing about that person, unless their answer is known. Votes must be
    independent given the truth: those of copies are joined before.

    Args:
        gold: the known `first_is_better` by (item, first, second).
    """
    found = list(votes)
    person_of = {person: place for place, person in enumerate(sorted({vote.person for vote in found}))}
    counts = Counter((vote.item, vote.first, vote.second) for vote in found)
    telling = {pair: place for place, pair in enumerate(pair for pair in counts if counts[pair] > 1 or pair in gold)}
    rows = [vote for vote in found if (vote.item, vote.first, vote.second) in telling]
    people = np.array([person_of[vote.person] for vote in rows], np.int64)
    pairs = np.array([telling[vote.item, vote.first, vote.second] for vote in rows], np.int64)
    better = np.array([vote.first_is_better for vote in rows], np.float64)
    known = np.array([gold.get(pair, math.nan) for pair in telling], np.float64)
    given = np.bincount(people, minlength=len(person_of))
    right = np.full(len(person_of), _PRIOR_RIGHT / (_PRIOR_RIGHT + _PRIOR_WRONG))
    for _ in range(_MAX_ROUNDS):
        log_odds = np.log(right / (1 - right))
        posterior = expit(np.bincount(pairs, (2 * better - 1) * log_odds[people], len(telling)))
        truth = np.where(np.isnan(known), posterior, known)[pairs]
        agreed = np.bincount(people, better * truth + (1 - better) * (1 - truth), len(person_of))
        fresh = (agreed + _PRIOR_RIGHT) / (given + _PRIOR_RIGHT + _PRIOR_WRONG)
        change = np.abs(fresh - right).max(initial=0.0)
        right = np.clip(fresh, 1 - _CERTAIN, _CERTAIN)
        if change < _CHANGE:
            break
    return {person: float(right[place]) for person, place in person_of.items()}


def weight(reliability: float) -> float:
    """The weight of a vote: the log-odds of being right; 0 for someone who guesses, or is worse."""
    bounded = min(max(reliability, 0.5), _CERTAIN)
    return math.log(bounded / (1 - bounded))


def margins(votes: Iterable[Vote], weights: Mapping[int, float]) -> Mapping[Pair, float]:
    """For each pair with a majority of weighted votes, by how much; the better reply is first."""
    sums: dict[Pair, float] = defaultdict(float)
    for vote in votes:
        sums[vote.first, vote.second] += (2 * vote.first_is_better - 1) * weights[vote.person]
    return {(pair if found > 0 else (pair[1], pair[0])): abs(found) for pair, found in sums.items() if found != 0}


def ranked_pairs(margins: Mapping[Pair, float]) -> frozenset[Pair]:
    """A consistent order: strong majorities first, weaker ones as far as they do not contradict them (Tideman 1987).
    Majorities of equal strength that contradict each other all fall. Contains every pair that follows; pairs that are
    not in it, in either direction, are ties or unknown.
    """
    locked: frozenset[Pair] = frozenset()
    ordered = sorted(margins.items(), key=lambda entry: -entry[1])
    for _, group in itertools.groupby(ordered, key=lambda entry: entry[1]):
        fresh = {pair for pair, _ in group if (pair[1], pair[0]) not in locked}
        together = _closure(locked | fresh)
        locked = _closure(locked | {(better, worse) for better, worse in fresh if (worse, better) not in together})
    return locked


def _closure(pairs: Iterable[Pair]) -> frozenset[Pair]:
    found = set(pairs)
    nodes = {node for pair in found for node in pair}
    for middle, start, end in itertools.product(nodes, repeat=3):
        if (start, middle) in found and (middle, end) in found:
            found.add((start, end))
    return frozenset(found)


def as_order(pairs: frozenset[Pair]) -> list[int] | None:
    """The replies in the pairs, best first. None: some of them are not ordered."""
    nodes = {node for pair in pairs for node in pair}
    if len(pairs) != len(nodes) * (len(nodes) - 1) // 2:
        return None
    return sorted(nodes, key=lambda node: -sum(better == node for better, _ in pairs))
