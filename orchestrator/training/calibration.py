"""How far the scores of a reward model can be taken at their word."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.training.ranking import order

_BINS = 10


@dataclass(frozen=True)
class Bin:
    """Pairs whose confidence, σ(|s_i - s_j|), is in one of ten equal parts of ½ to 1.

    Args:
        confidence: its mean.
        accuracy: share of pairs in the right order, equal scores counting half.
    """

    confidence: float
    accuracy: float
    pairs: int


@dataclass(frozen=True)
class Calibration:
    """Of held-out replies.

    Args:
        curve: the bins that hold pairs, the least confident first.
        expected_error: mean difference of confidence and accuracy over all pairs (Naeini 2015); None: no pairs.
        length_correlation: Pearson's correlation of the scores of replies and their numbers of tokens; None: one of the
            two is constant.
    """

    curve: Sequence[Bin]
    expected_error: float | None
    length_correlation: float | None


def calibration(scores: Sequence[Sequence[float]], lengths: Sequence[Sequence[int]]) -> Calibration:
    """Args: scores, lengths: per record, of its replies, best reply first."""
    found: dict[int, list[tuple[float, float]]] = {}
    for better, worse in itertools.chain.from_iterable(itertools.combinations(replies, 2) for replies in scores):
        confidence = 1.0 / (1.0 + math.exp(-abs(better - worse)))
        number = min(int((2.0 * confidence - 1.0) * _BINS), _BINS - 1)
        found.setdefault(number, []).append((confidence, order(better, worse)))
    means = [(np.mean(pairs, axis=0), len(pairs)) for _, pairs in sorted(found.items())]
    curve = [Bin(float(mean[0]), float(mean[1]), count) for mean, count in means]
    total = sum(part.pairs for part in curve)
    error = sum(part.pairs * abs(part.confidence - part.accuracy) for part in curve) / total if total else None
    flat = [list(itertools.chain.from_iterable(values)) for values in (scores, lengths)]
    return Calibration(curve, error, correlation(*flat))


def correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Pearson's correlation. None when one list is constant, or has less than two values."""
    if len({*first}) < 2 or len({*second}) < 2:
        return None
    return float(np.corrcoef(first, second)[0, 1])
