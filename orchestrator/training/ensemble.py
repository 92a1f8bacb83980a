"""Ensembles of reward heads: what each head learns from, and how far they disagree (docs/adr/0015-reward-heads.md).

Shapes: B replies, H heads, P pairs, R records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from orchestrator.prompts import derive_seed

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Disagreement:
    """How heads judge held-out pairs.

    Args:
        accuracies: per head, its share of pairs in the right order.
        right, wrong: mean disagreement on the difference of a pair's scores, where the mean score has the pair in the
            right order and in the wrong one; None: there are no such pairs.
    """

    accuracies: Sequence[float | None]
    right: float | None
    wrong: float | None


def bootstrap_weights(ids: Sequence[str], num_heads: int, seed: int) -> Numbers:
    """Weights (R, H) of records in the loss of each head, from (seed, id, head) alone: exponential with mean 1, the
    Bayesian bootstrap (Rubin 1981) without its normalisation. Records with one id have equal weights."""
    found = [[_exponential(derive_seed("bootstrap", seed, name, head)) for head in range(num_heads)] for name in ids]
    return np.array(found, np.float64).reshape(len(ids), num_heads)


def _exponential(number: int) -> float:
    """By inversion, of a number in [0, 2^63)."""
    return float(-np.log(((number >> 11) + 0.5) / 2.0**52))


def head_seeds(seed: int, num_heads: int) -> list[int]:
    """Seeds of the heads' initial weights. The first is that of a model with one head."""
    return [seed, *(derive_seed("reward head", seed, head) for head in range(1, num_heads))]


def mean_scores(scores_BH: npt.ArrayLike) -> Numbers:
    """The score of each reply: the mean of its heads."""
    means_B: Numbers = np.asarray(scores_BH, np.float64).mean(-1)
    return means_B


def disagreement(scores_BH: npt.ArrayLike) -> Numbers:
    """Standard deviation over heads, of each reply's score or of each pair's difference of scores."""
    spreads_B: Numbers = np.asarray(scores_BH, np.float64).std(-1)
    return spreads_B


def mean_disagreement(differences_PH: Numbers) -> tuple[float | None, float | None]:
    """Mean disagreement on the pairs that the mean orders correctly, and on those that it orders wrongly.

    Args:
        differences_PH: score of the better reply less that of the worse one.
    """
    means, spreads = mean_scores(differences_PH), disagreement(differences_PH)
    right, wrong = spreads[means > 0], spreads[means < 0]
    return _mean(right), _mean(wrong)


def _mean(values: Numbers) -> float | None:
    return float(values.mean()) if len(values) else None
