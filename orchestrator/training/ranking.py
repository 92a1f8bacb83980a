"""Measures how well scores agree with rankings, and shuffles preferences into batches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")


def epoch_batches(num_records: int, *, records_per_batch: int, seed: int, epoch: int) -> Iterator[list[int]]:
    """Record indices of each batch of an epoch: a permutation determined by (seed, epoch).

    Each record is in exactly one batch; the last batch may be smaller.
    """
    order = np.random.default_rng((seed, epoch)).permutation(num_records)
    for start in range(0, num_records, records_per_batch):
        yield order[start : start + records_per_batch].tolist()


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` items, evenly spaced over the sequence and including the first."""
    if len(items) <= count:
        return list(items)
    return [items[index * len(items) // count] for index in range(count)]


def thinned(items: Iterable[Item], count: int) -> list[Item]:
    """As `spread`, of items that are too many to be held: at most 2 `count` of them are at any time."""
    kept: list[Item] = []
    every = 1
    for number, item in enumerate(items):
        if number % every == 0:
            kept.append(item)
        if len(kept) > 2 * count:
            kept, every = kept[::2], 2 * every
    return spread(kept, count)


def num_pairs(num_replies: int) -> int:
    """K choose 2."""
    return num_replies * (num_replies - 1) // 2


def concordant_pairs(scores: Sequence[float]) -> float:
    """Number of pairs that the scores order correctly. Replies are given best first; equal scores count as half."""
    return sum(order(better, worse) for better, worse in itertools.combinations(scores, 2))


def order(better: float, worse: float) -> float:
    """1: the better reply has the higher score; ½: equal scores; 0: the lower score."""
    return 1.0 if better > worse else 0.5 if better == worse else 0.0


def wilson_interval(successes: float, trials: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Score interval of a binomial proportion (Wilson 1927); 95 % with the default z. No trials: (0, 1)."""
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    centre = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    # At a proportion of 0 or 1 the bound is exact, but rounding could exceed it.
    return max((centre - half) / scale, 0.0), min((centre + half) / scale, 1.0)


def difference_interval(successes: float, trials: int, other: float, other_trials: int) -> tuple[float, float]:
    """Interval of the difference of two independent proportions, by their score intervals (Newcombe 1998, method 10);
    95 %. Both need trials."""
    share, other_share = successes / trials, other / other_trials
    low, high = wilson_interval(successes, trials)
    other_low, other_high = wilson_interval(other, other_trials)
    difference = share - other_share
    return (
        difference - math.hypot(share - low, other_high - other_share),
        difference + math.hypot(high - share, other_share - other_low),
    )


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Kendall's tau-b of two lists of scores (Kendall 1945), which corrects for ties.

    Returns None if all scores of a list are equal.
    """
    concordance = first_differs = second_differs = 0
    for i, j in itertools.combinations(range(len(first)), 2):
        a, b = np.sign(first[i] - first[j]), np.sign(second[i] - second[j])
        concordance += int(a * b)
        first_differs += int(a != 0)
        second_differs += int(b != 0)
    if not first_differs or not second_differs:
        return None
    return concordance / math.sqrt(first_differs * second_differs)
