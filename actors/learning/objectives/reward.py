"""Losses of reward models: the torch halves of REWARD_LOSSES in orchestrator/config/losses.py, by the same names.

Each returns sums over prompts (or over replies, where each has a score of its own); the caller divides by their number
in the whole batch, over all ranks. Shapes: B replies, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from actors.learning.objectives.losses import LossTerms, PairTerm, log_sigmoid, ranking_loss
from orchestrator.config.losses import Ordinal, RankedScores, Regression, RewardLoss


@dataclass(frozen=True, eq=False)
class Judgements:
    """What a micro-batch's replies are judged to be.

    Args:
        quality_B, group_B: see ranking_loss; the score of a reply, where each is judged alone.
        strength_B: the difference of two replies' numbers is multiplied by the margin: their places, or scores.
        weight_B: of each reply's prompt in the loss; None: 1.
    """

    quality_B: Tensor
    group_B: Tensor
    strength_B: Tensor
    weight_B: Tensor | None = None

    @classmethod
    def of(cls, columns: Mapping[str, Tensor]) -> Judgements:
        return cls(columns["quality"], columns["group"], columns["strength"])


RewardObjective = Callable[[Any, Tensor, Judgements], LossTerms]
"""(section, scores_B, judgements) -> the loss of a micro-batch."""


def pairwise(loss: RankedScores, scores_B: Tensor, judged: Judgements) -> LossTerms:
    """-log σ(s_better - s_worse - m) (Ouyang 2022, eq. 1; Touvron 2023, eq. 2, with m the margin times the places
    between the two, or times what the record says), and c (s_better + s_worse)² (Eisenstein 2023, eq. 2)."""
    return ranking_loss(scores_B, judged.quality_B, judged.group_B, _term(loss, scores_B, judged, log_sigmoid))


def log_exp(loss: RankedScores, scores_B: Tensor, judged: Judgements) -> LossTerms:
    """log(1 + exp(s_worse - s_better)) (Bai 2022, section 4.1): equal to `pairwise` up to rounding."""
    term = _term(loss, scores_B, judged, lambda margin: functional.softplus(-margin))
    return ranking_loss(scores_B, judged.quality_B, judged.group_B, term)


def _term(loss: RankedScores, scores_B: Tensor, judged: Judgements, term: PairTerm) -> PairTerm:
    asked = term if not loss.margin and not loss.centring else _with_margin(loss, scores_B, judged.strength_B, term)
    weight_B = judged.weight_B
    return asked if weight_B is None else lambda margin_BB: weight_B[:, None] * asked(margin_BB)


def _with_margin(loss: RankedScores, scores_B: Tensor, strength_B: Tensor, term: PairTerm) -> PairTerm:
    asked_BB = loss.margin * (strength_B[:, None] - strength_B[None, :])
    centre_BB = loss.centring * (scores_B[:, None] + scores_B[None, :]) ** 2
    return lambda margin_BB: term(margin_BB - asked_BB) + centre_BB


def regression(_loss: Regression, scores_B: Tensor, judged: Judgements) -> LossTerms:
    """(s - t)², t the reply's own score, here its quality."""
    return _of_single((scores_B - judged.quality_B) ** 2, scores_B, judged)


def ordinal(loss: Ordinal, scores_B: Tensor, judged: Judgements) -> LossTerms:
    """Σ_k -log σ(±(s - k - ½)) over the boundaries k of two bins, + where the reply has more than k stars (Rennie
    2005, section 4.2, all-threshold)."""
    bounds_K = torch.arange(loss.lowest, loss.highest, device=scores_B.device) + 0.5
    sign_BK = torch.where(judged.quality_B[:, None] > bounds_K, 1.0, -1.0)
    terms_BK = log_sigmoid(sign_BK * (scores_B[:, None] - bounds_K))
    # Nothing bounds the scores of replies with the most or the fewest stars.
    return _of_single(terms_BK, scores_B.clamp(loss.lowest, loss.highest), judged)


def _of_single(terms: Tensor, scores_B: Tensor, judged: Judgements) -> LossTerms:
    """Args: terms: of each reply, B or (B, K)."""
    weight_B = judged.weight_B
    loss = (terms if weight_B is None else weight_B[:, None] * terms.reshape(len(terms), -1)).sum()
    error = (scores_B - judged.quality_B).detach().abs().sum()
    return LossTerms(loss, {"loss": loss.detach(), "absolute_error": error})


REWARD_OBJECTIVES: Mapping[str, RewardObjective] = {
    "pairwise": pairwise,
    "log-exp": log_exp,
    "regression": regression,
    "ordinal": ordinal,
}


def over_heads(loss: RewardLoss, scores_BH: Tensor, judged: Judgements, weights_BH: Tensor) -> LossTerms:
    """The mean over heads of each head's loss with its own weights (Osband 2016): the trunk learns from the mean of the
    heads' gradients. The metrics are those of the mean score, without weights."""
    objective = REWARD_OBJECTIVES[loss.name]
    terms = [
        objective(loss, scores_B, replace(judged, weight_B=weight_B)).loss
        for scores_B, weight_B in zip(scores_BH.unbind(-1), weights_BH.unbind(-1), strict=True)
    ]
    return LossTerms(torch.stack(terms).mean(), objective(loss, scores_BH.detach().mean(-1), judged).sums)
