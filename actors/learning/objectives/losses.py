"""Losses. Each returns sums over its tokens (or prompts). The caller divides by the count of the whole minibatch over
all ranks, so the gradient does not depend on micro-batches, packing or ranks.

Shapes: N response tokens, concatenated; B sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from orchestrator.algorithms.kl import LOG_RATIO_BOUND

PairTerm = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class LossTerms:
    """Args:
    loss: the sum to differentiate.
    sums: detached sums of metrics; divided by the same count as the loss unless stated otherwise.
    maxima: metrics that are merged by maximum.
    """

    loss: Tensor
    sums: Mapping[str, Tensor]
    maxima: Mapping[str, Tensor] = field(default_factory=dict)


def bounded(log_ratio: Tensor) -> Tensor:
    """Clipped to ± LOG_RATIO_BOUND, before it is an exponent."""
    return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def policy_loss(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    *,
    clip_ratio: float,
    clip_ratio_high: float | None = None,
    dual_clip: float | None = None,
    weights_N: Tensor | None = None,
) -> LossTerms:
    """Clipped surrogate (Schulman 2017, eq. 7), negated: sum of -w · min(r A, clip(r, 1 - ε, 1 + ε_high) A), with
    r = exp(new - old). With a dual clip c (Ye 2020), the minimum is at least c A where A < 0.

    `approx_kl` is k3 of KL(old || new); `clip_fraction` counts ratios outside 1 - ε and 1 + ε_high.
    """
    ratio_N = bounded(logprobs_N - old_logprobs_N).exp()
    return ratio_loss(
        ratio_N,
        logprobs_N.detach() - old_logprobs_N,
        advantages_N,
        clip_ratio=clip_ratio,
        clip_ratio_high=clip_ratio_high,
        dual_clip=dual_clip,
        weights_N=weights_N,
    )


def ratio_loss(
    ratio_N: Tensor,
    log_ratio_N: Tensor,
    advantages_N: Tensor,
    *,
    clip_ratio: float,
    clip_ratio_high: float | None,
    dual_clip: float | None,
    weights_N: Tensor | None,
) -> LossTerms:
    """`policy_loss` with any ratio r. log_ratio_N: see surrogate_terms."""
    clipped_N = clipped(ratio_N, clip_ratio, clip_ratio_high)
    surrogate_N = torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)
    sums = {}
    if dual_clip is not None:
        is_bounded_N = (advantages_N < 0) & (surrogate_N < dual_clip * advantages_N)
        surrogate_N = torch.where(is_bounded_N, dual_clip * advantages_N, surrogate_N)
        sums["dual_clip_fraction"] = is_bounded_N.sum()
    terms = surrogate_terms(surrogate_N, ratio_N, clipped_N, log_ratio_N, weights_N)
    return LossTerms(terms.loss, {**terms.sums, **sums}, terms.maxima)


def clipped(ratio: Tensor, clip_ratio: float, clip_ratio_high: float | None) -> Tensor:
    return ratio.clamp(1.0 - clip_ratio, 1.0 + (clip_ratio if clip_ratio_high is None else clip_ratio_high))


def surrogate_terms(
    surrogate_N: Tensor, ratio_N: Tensor, clipped_N: Tensor, log_ratio_N: Tensor, weights_N: Tensor | None
) -> LossTerms:
    """The weighted sum of a surrogate, negated, and the metrics of its ratios.

    Args:
        ratio_N, clipped_N: the ratio that the surrogate clips, before and after.
        log_ratio_N: new - old of each token, detached and not bounded.
    """
    if weights_N is not None:
        surrogate_N = surrogate_N * weights_N
    loss = -surrogate_N.sum()
    with torch.no_grad():
        token_log_ratio_N = bounded(log_ratio_N)
        sums = {
            "policy_loss": loss.detach(),
            "clip_fraction": (ratio_N != clipped_N).sum(),
            "approx_kl": (torch.expm1(token_log_ratio_N) - token_log_ratio_N).sum(),
            "ratio_mean": ratio_N.sum(),
            "ratio_bounded_fraction": (log_ratio_N.abs() > LOG_RATIO_BOUND).sum(),
        }
        maxima = {"ratio_max": ratio_N.max(), "ratio_deviation_max": token_log_ratio_N.abs().max().exp()}
        return LossTerms(loss, sums, maxima)


def likelihood_loss(logprobs_N: Tensor) -> LossTerms:
    """Negative log-likelihood of the learned tokens, summed: cross entropy of their next-token distributions."""
    loss = -logprobs_N.sum()
    return LossTerms(loss, {"loss": loss.detach()})


def whiten(advantages_N: Tensor, mean: float, std: float) -> Tensor:
    """(a - mean) / (std + 1e-8) with moments of the whole batch, so the result does not depend on sharding."""
    return (advantages_N - mean) / (std + 1e-8)


def value_loss(values_N: Tensor, old_values_N: Tensor, returns_N: Tensor, *, clip_value: float | None) -> LossTerms:
    """½ max((V - R)², (clip(V, V_old ± c) - R)²), summed; not clipped if `clip_value` is None."""
    squares_N = (values_N - returns_N) ** 2
    clipped = torch.zeros((), device=values_N.device)
    if clip_value is not None:
        clipped_N = old_values_N + (values_N - old_values_N).clamp(-clip_value, clip_value)
        clipped_squares_N = (clipped_N - returns_N) ** 2
        clipped = (clipped_squares_N > squares_N).sum()
        squares_N = torch.maximum(squares_N, clipped_squares_N)
    loss = 0.5 * squares_N.sum()
    sums = {"loss": loss.detach(), "clip_fraction": clipped, "value_mean": values_N.detach().sum()}
    return LossTerms(loss, sums)


def log_sigmoid(margin: Tensor) -> Tensor:
    """-log σ(s_better - s_worse), the term of a pair in the model of Bradley and Terry (1952)."""
    return -functional.logsigmoid(margin)


def ranking_loss(scores_B: Tensor, quality_B: Tensor, group_B: Tensor, term: PairTerm = log_sigmoid) -> LossTerms:
    """Reward-model loss of InstructGPT (Ouyang 2022, eq. 1), summed over prompts.

    The term of a prompt is the mean of the terms of its pairs. Divide by the number of prompts. Ties form no pair.

    Args:
        quality_B: higher for a better reply.
        group_B: id of the prompt of each reply.
        term: loss of a pair, a function of the matrix of s_i - s_j.

    Returns:
        Sums `ranking_loss` over prompts, and `pairs`, `correct_pairs`, `margin_pairs` over pairs.
    """
    same_BB = group_B[:, None] == group_B[None, :]
    better_BB = same_BB & (quality_B[:, None] > quality_B[None, :])
    margin_BB = scores_B[:, None] - scores_B[None, :]
    num_pairs_B = _pairs_per_group(better_BB, same_BB)
    terms_BB = term(margin_BB) / num_pairs_B[:, None].clamp(min=1)
    loss = terms_BB[better_BB].sum()
    margins = margin_BB.detach()[better_BB]
    sums = {
        "ranking_loss": loss.detach(),
        "pairs": better_BB.sum(),
        "correct_pairs": (margins > 0).sum(),
        "margin_pairs": margins.sum(),
    }
    return LossTerms(loss, sums)


def _pairs_per_group(better_BB: Tensor, same_BB: Tensor) -> Tensor:
    """For each reply, the number of pairs of its prompt."""
    return same_BB.float() @ better_BB.sum(1).float()


def sft_loss(logprobs_N: Tensor, mask_N: Tensor) -> LossTerms:
    """Cross entropy, summed over the tokens whose mask is 1. Divide by their number."""
    loss = -(logprobs_N * mask_N).sum()
    return LossTerms(loss, {"sft_loss": loss.detach(), "tokens": mask_N.sum()})
