"""Losses of reward models: the torch halves of REWARD_LOSSES in orchestrator/config/losses.py, by the same names.

Each returns sums over prompts (or over replies, where each has a score of its own); the caller divides by their number
in the whole batch, over all ranks. Shapes: B replies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from actors.learning.objectives.losses import LossTerms, PairTerm, log_sigmoid, ranking_loss
from orchestrator.config.losses import Ordinal, RankedScores, Regression

RewardObjective = Callable[[Any, Tensor, Tensor, Tensor], LossTerms]
"""(section, scores_B, quality_B, group_B) -> the loss of a micro-batch; see ranking_loss for quality and group."""


def pairwise(loss: RankedScores, scores_B: Tensor, quality_B: Tensor, group_B: Tensor) -> LossTerms:
    """-log σ(s_better - s_worse - m) (Ouyang 2022, eq. 1; Touvron 2023, eq. 2, with m the margin times the places
    between the two), and c (s_better + s_worse)² (Eisenstein 2023, eq. 2)."""
    return ranking_loss(scores_B, quality_B, group_B, _term(loss, scores_B, quality_B, log_sigmoid))


def log_exp(loss: RankedScores, scores_B: Tensor, quality_B: Tensor, group_B: Tensor) -> LossTerms:
    """log(1 + exp(s_worse - s_better)) (Bai 2022, section 4.1): equal to `pairwise` up to rounding."""
    term = _term(loss, scores_B, quality_B, lambda margin: functional.softplus(-margin))
    return ranking_loss(scores_B, quality_B, group_B, term)


def _term(loss: RankedScores, scores_B: Tensor, quality_B: Tensor, term: PairTerm) -> PairTerm:
    if not loss.margin and not loss.centring:
        return term
    asked_BB = loss.margin * (quality_B[:, None] - quality_B[None, :])
    centre_BB = loss.centring * (scores_B[:, None] + scores_B[None, :]) ** 2
    return lambda margin_BB: term(margin_BB - asked_BB) + centre_BB


def regression(_loss: Regression, scores_B: Tensor, quality_B: Tensor, _group_B: Tensor) -> LossTerms:
    """(s - t)², t the reply's own score, here `quality_B`."""
    return _of_single(((scores_B - quality_B) ** 2).sum(), scores_B, quality_B)


def ordinal(loss: Ordinal, scores_B: Tensor, quality_B: Tensor, _group_B: Tensor) -> LossTerms:
    """Σ_k -log σ(±(s - k - ½)) over the boundaries k of two bins, + where the reply has more than k stars (Rennie
    2005, section 4.2, all-threshold)."""
    bounds_K = torch.arange(loss.lowest, loss.highest, device=scores_B.device) + 0.5
    sign_BK = torch.where(quality_B[:, None] > bounds_K, 1.0, -1.0)
    terms_BK = log_sigmoid(sign_BK * (scores_B[:, None] - bounds_K))
    # Nothing bounds the scores of replies with the most or the fewest stars.
    return _of_single(terms_BK.sum(), scores_B.clamp(loss.lowest, loss.highest), quality_B)


def _of_single(loss: Tensor, scores_B: Tensor, quality_B: Tensor) -> LossTerms:
    error = (scores_B - quality_B).detach().abs().sum()
    return LossTerms(loss, {"loss": loss.detach(), "absolute_error": error})


REWARD_OBJECTIVES: Mapping[str, RewardObjective] = {
    "pairwise": pairwise,
    "log-exp": log_exp,
    "regression": regression,
    "ordinal": ordinal,
}
