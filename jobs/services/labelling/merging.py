"""Merges the rankings of several people: reliabilities of people, then ranked pairs for each item.

A vote is one person's opinion on two replies of an item.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Pair = tuple[int, int]  # the first is better
_MAX_ROUNDS = 100
_CHANGE = 1e-6
_PRIOR_RIGHT, _PRIOR_WRONG = 8.0, 2.0  # votes that everybody is credited with
_CERTAIN = 0.99  # no one counts as more reliable


@dataclass(frozen=True, slots=True)
class Vote:
    """`first_is_better`: 1, 0, or 1/2 for a tie. `first` < `second` are indices of an item's replies."""

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


def _better(rank: float, other: float) -> float:
    return 1.0 if rank < other else 0.0 if rank > other else 0.5


def reliabilities(votes: Iterable[Vote], gold: Mapping[tuple[int, int, int], float]) -> Mapping[int, float]:
    """The probability of each person's votes to be right, by expectation maximisation (Dawid and Skene 1979, one
    parameter per person).

    Pairs on which only one person voted say nothing about that person, unless their answer is known.

    Args:
        gold: the known `first_is_better` by (item, first, second).
    """
    by_pair: dict[tuple[int, int, int], list[Vote]] = defaultdict(list)
    people: set[int] = set()
    for vote in votes:
        by_pair[vote.item, vote.first, vote.second].append(vote)
        people.add(vote.person)
    telling = {pair: found for pair, found in by_pair.items() if len(found) > 1 or pair in gold}
    right = dict.fromkeys(people, _PRIOR_RIGHT / (_PRIOR_RIGHT + _PRIOR_WRONG))
    for _ in range(_MAX_ROUNDS):
        agreed, given = Counter[int](), Counter[int]()
        for pair, found in telling.items():
            first_is_better = gold[pair] if pair in gold else _posterior(found, right)
            for vote in found:
                share = vote.first_is_better * first_is_better + (1 - vote.first_is_better) * (1 - first_is_better)
                agreed[vote.person] += share  # type: ignore[assignment]  # a Counter of numbers
                given[vote.person] += 1
        fresh = {
            person: (agreed[person] + _PRIOR_RIGHT) / (given[person] + _PRIOR_RIGHT + _PRIOR_WRONG) for person in people
        }
        change = max((abs(fresh[person] - right[person]) for person in people), default=0.0)
        right = fresh
        if change < _CHANGE:
            break
    return right


def weight(reliability: float) -> float:
    """The weight of a vote: the log-odds of being right; 0 for someone who guesses, or is worse."""
    bounded = min(max(reliability, 0.5), _CERTAIN)
    return math.log(bounded / (1 - bounded))


def _posterior(votes: Sequence[Vote], right: Mapping[int, float]) -> float:
    """The probability that the first reply is better."""
    odds = 0.0
    for vote in votes:
        reliability = min(max(right[vote.person], 1 - _CERTAIN), _CERTAIN)
        odds += (2 * vote.first_is_better - 1) * math.log(reliability / (1 - reliability))
    return 1 / (1 + math.exp(-odds))


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
