"""Weights of tokens that correct for what separates the learner's policy from the samples: the engine's other numerics,
and older weights.

    truncated weights   min(r, cap)                       TIS (Yao 2025)
    masked weights      r inside of [floor, cap], else 0  IcePop (Ling Team 2025), MIS (Liu 2025)
    gates               0 or 1, by a divergence of the token or of its sample

r = p_learner / p_engine of the token, or of its sample: the product over its tokens. A token that is masked or gated
has weight 0 and is still counted in what the loss is divided by. Weights have no gradient.

Shapes: N learned tokens, concatenated; B rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.learning.packing import row_maxima, row_sums
from orchestrator.algorithms.algorithm import Algorithm

_LEAST_PROBABILITY = 1e-6  # keeps the logarithms of binary_kl finite


@dataclass(frozen=True, eq=False)
class Correction:
    """Args:
    sums: of metrics, over tokens.
    """

    weights_N: Tensor
    sums: Mapping[str, Tensor]


def correction(
    algorithm: Algorithm, old_logprobs_N: Tensor, engine_logprobs_N: Tensor, lengths_B: Tensor
) -> Correction | None:
    """The weights that the config asks for; None: all are 1."""
    weights_N: Tensor | None = None
    sums: dict[str, Tensor] = {}
    if algorithm.importance_cap is not None:
        weights_N = importance_weights(algorithm, old_logprobs_N - engine_logprobs_N, lengths_B)
        sums["importance_weight_mean"] = weights_N.sum()
        if algorithm.importance_mode == "mask":
            sums["importance_masked_fraction"] = (weights_N == 0).sum()
        else:
            sums["importance_capped_fraction"] = (weights_N >= algorithm.importance_cap).sum()
    if algorithm.gate is not None:
        open_N = is_open(algorithm, old_logprobs_N, engine_logprobs_N, lengths_B)
        weights_N = open_N.float() if weights_N is None else weights_N * open_N
        sums["gate_closed_fraction"] = (~open_N).sum()
    return None if weights_N is None else Correction(weights_N.detach(), sums)


def importance_weights(algorithm: Algorithm, log_ratio_N: Tensor, lengths_B: Tensor) -> Tensor:
    """Args: log_ratio_N: learner's log-prob less the engine's."""
    if algorithm.importance_level == "sequence":
        log_ratio_N = row_sums(log_ratio_N, lengths_B).repeat_interleave(lengths_B)
    ratio_N = log_ratio_N.exp()
    floor, cap = algorithm.importance_floor, algorithm.importance_cap
    weights_N = ratio_N.clamp(min=floor, max=cap)
    if algorithm.importance_mode == "truncate":
        return weights_N
    return torch.where(weights_N == ratio_N, ratio_N, 0.0)


def is_open(algorithm: Algorithm, old_logprobs_N: Tensor, engine_logprobs_N: Tensor, lengths_B: Tensor) -> Tensor:
    """Whether the gate of each token, or of its sample, is open."""
    assert algorithm.gate is not None and algorithm.gate_max is not None
    statistic_N = DIVERGENCES[algorithm.gate](old_logprobs_N, engine_logprobs_N)
    if algorithm.gate_over != "token":
        statistic_N = _OVER_ROWS[algorithm.gate_over](statistic_N, lengths_B).repeat_interleave(lengths_B)
    if algorithm.gate == "ratio":
        statistic_N = statistic_N.exp()
    open_N = statistic_N <= algorithm.gate_max
    return open_N if algorithm.gate_min is None else open_N & (statistic_N >= algorithm.gate_min)


def log_ratio(old_logprobs_N: Tensor, engine_logprobs_N: Tensor) -> Tensor:
    return old_logprobs_N - engine_logprobs_N


def k2(old_logprobs_N: Tensor, engine_logprobs_N: Tensor) -> Tensor:
    """(old - engine)² / 2"""
    return 0.5 * (old_logprobs_N - engine_logprobs_N) ** 2


def k3(old_logprobs_N: Tensor, engine_logprobs_N: Tensor) -> Tensor:
    """k3 of KL(engine || learner)."""
    log_ratio_N = old_logprobs_N - engine_logprobs_N
    return torch.expm1(log_ratio_N) - log_ratio_N


def binary_kl(old_logprobs_N: Tensor, engine_logprobs_N: Tensor) -> Tensor:
    """KL(engine || learner) of two outcomes: this token, or any other one."""
    learner_N, engine_N = (_probabilities(logprobs_N) for logprobs_N in (old_logprobs_N, engine_logprobs_N))
    others_N = (1.0 - engine_N) * ((1.0 - engine_N) / (1.0 - learner_N)).log()
    return engine_N * (engine_N / learner_N).log() + others_N


def tv(old_logprobs_N: Tensor, engine_logprobs_N: Tensor) -> Tensor:
    """Total variation of the same two outcomes: |p_engine - p_learner|."""
    return (_probabilities(engine_logprobs_N) - _probabilities(old_logprobs_N)).abs()


def _probabilities(logprobs_N: Tensor) -> Tensor:
    return logprobs_N.exp().clamp(_LEAST_PROBABILITY, 1.0 - _LEAST_PROBABILITY)


DIVERGENCES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ratio": log_ratio,
    "k2": k2,
    "k3": k3,
    "binary-kl": binary_kl,
    "tv": tv,
}
_OVER_ROWS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "seq-mean": lambda values_N, lengths_B: row_sums(values_N, lengths_B) / lengths_B,
    "seq-sum": row_sums,
    "seq-max": row_maxima,
}
