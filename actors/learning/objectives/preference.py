"""Losses that learn a policy from preferences, without a reward model. The torch halves of PREFERENCE_LOSSES in
orchestrator/config/losses.py, by the same names.

Every loss gives each reply an implicit reward; a loss of pairs is a function of the difference of two rewards. All
pairs of one prompt make one term, their mean, as in the ranking loss: a prompt with K replies counts as much as one
with two. Sums are over prompts (KTO: replies); the caller divides by their number in the whole batch, over all ranks.

Shapes: N learned tokens laid end to end, B replies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from actors.learning.objectives.losses import LossTerms, ranking_loss
from actors.learning.packing import MicroBatch, row_sums
from orchestrator.config.losses import Cpo, Dpo, Ipo, Kto, Orpo, PairLoss, PreferenceLoss, Simpo

_ALMOST_CERTAIN = -1e-6  # log-prob from which odds would overflow


@dataclass(frozen=True, eq=False)
class Replies:
    """The replies of one micro-batch.

    Args:
        logprob_B: log-prob of all tokens of the reply.
        reference_B: the same under the reference; zeros for a loss that needs none.
        num_tokens_B: tokens of the reply.
        nll_B: cross-entropy over the learned tokens: those of the reply, and of the prompt where the loss learns it.
        quality_B: higher for a better reply to the same prompt; KTO: 1 for a desirable reply, 0 for an undesirable one.
        group_B: number of the prompt.
    """

    logprob_B: Tensor
    reference_B: Tensor
    num_tokens_B: Tensor
    nll_B: Tensor
    quality_B: Tensor
    group_B: Tensor


@dataclass(frozen=True)
class BatchNumbers:
    """What the loss of a micro-batch needs to know about its whole batch, over all ranks.

    Args:
        prompts_per_token: prompts divided by learned tokens of the best replies.
        kl: KTO's baseline, KL(policy || reference) in nats per reply, estimated from mismatched replies; see kto_kl.
    """

    prompts_per_token: float = 0.0
    kl: float = 0.0


@dataclass(frozen=True)
class PreferenceObjective:
    """Args:
    reward: the implicit reward of every reply.
    terms: the loss of (section, rewards, replies, batch). Its sums are `loss`, and over pairs (KTO: replies)
        `compared`, `correct` and `margin`: their number, those in the right order, and their differences of rewards
        (KTO: from the baseline).
    """

    reward: Callable[[Any, Replies], Tensor]
    terms: Callable[[Any, Tensor, Replies, BatchNumbers], LossTerms]


def replies_of(logprobs_N: Tensor, micro: MicroBatch) -> Replies:
    """Reads the columns `quality`, `group` and, if they are there, `reference` and the per-token `reply`, which is 0
    for learned tokens of the prompt."""
    columns = micro.columns
    in_reply_N = columns["reply"] if "reply" in columns else torch.ones_like(logprobs_N)
    return Replies(
        logprob_B=row_sums(logprobs_N * in_reply_N, micro.lengths_B),
        reference_B=columns["reference"] if "reference" in columns else torch.zeros_like(columns["quality"]),
        num_tokens_B=row_sums(in_reply_N, micro.lengths_B),
        nll_B=-row_sums(logprobs_N, micro.lengths_B),
        quality_B=columns["quality"],
        group_B=columns["group"],
    )


def log_ratio(loss: PreferenceLoss, replies: Replies) -> Tensor:
    """β log(π(y|x) / π_ref(y|x)) (Rafailov 2023, eq. 5 without the partition function)."""
    return loss.beta * (replies.logprob_B - replies.reference_B)


def mean_log_ratio(_loss: Ipo, replies: Replies) -> Tensor:
    """log(π(y|x) / π_ref(y|x)) / |y|. The paper has no division; its authors confirmed it to TRL, which divides too."""
    return (replies.logprob_B - replies.reference_B) / replies.num_tokens_B.clamp(min=1)


def mean_logprob(loss: Simpo, replies: Replies) -> Tensor:
    """β log π(y|x) / |y| (Meng 2024, eq. 4)."""
    return loss.beta * replies.logprob_B / replies.num_tokens_B.clamp(min=1)


def log_odds(_loss: Orpo, replies: Replies) -> Tensor:
    """log(p / (1 - p)) of p = π(y|x)^(1/|y|) (Hong 2024, eqs. 1 and 4)."""
    log_p_B = (replies.logprob_B / replies.num_tokens_B.clamp(min=1)).clamp(max=_ALMOST_CERTAIN)
    return log_p_B - (-torch.expm1(log_p_B)).log()


def logprob(loss: Cpo, replies: Replies) -> Tensor:
    """β log π(y|x) (Xu 2024, eq. 3)."""
    return loss.beta * replies.logprob_B


def smoothed(loss: Dpo | Cpo, margin: Tensor) -> Tensor:
    """-(1 - ε) log σ(m) - ε log σ(-m) (Rafailov 2023, eq. 7; Mitchell 2023 for ε)."""
    term = -functional.logsigmoid(margin)
    if loss.label_smoothing:
        term = (1.0 - loss.label_smoothing) * term - loss.label_smoothing * functional.logsigmoid(-margin)
    return term


def squared(loss: Ipo, margin: Tensor) -> Tensor:
    """(m - 1 / (2τ))² (Azar 2023, eq. 17)."""
    return (margin - 0.5 / loss.beta) ** 2


def with_margin(loss: Simpo, margin: Tensor) -> Tensor:
    """-log σ(m - γ) (Meng 2024, eq. 6)."""
    return -functional.logsigmoid(margin - loss.gamma)


def odds_ratio(loss: Orpo, margin: Tensor) -> Tensor:
    """-λ log σ(m) (Hong 2024, eqs. 6 and 7)."""
    return -loss.beta * functional.logsigmoid(margin)


def _pairs(
    term: Callable[[Any, Tensor], Tensor], loss: PairLoss, rewards_B: Tensor, replies: Replies, batch: BatchNumbers
) -> LossTerms:
    """The mean term over the pairs of a prompt, summed over prompts, and the cross-entropy of the best replies."""
    found = ranking_loss(rewards_B, replies.quality_B, replies.group_B, partial(term, loss))
    total = found.loss
    sums = {name: found.sums[f"{name}_pairs"] for name in ("correct", "margin")} | {"compared": found.sums["pairs"]}
    if loss.nll_weight:
        same_BB = replies.group_B[:, None] == replies.group_B[None, :]
        is_best_B = ~(same_BB & (replies.quality_B[:, None] < replies.quality_B[None, :])).any(1)
        nll = (replies.nll_B * is_best_B).sum() * batch.prompts_per_token
        total = total + loss.nll_weight * nll
        sums["nll"] = nll.detach()
    return LossTerms(total, {**sums, "loss": total.detach()})


def kto_loss(loss: Kto, rewards_B: Tensor, replies: Replies, batch: BatchNumbers) -> LossTerms:
    """λ_D (1 - σ(r - β z)) for desirable replies, λ_U (1 - σ(β z - r)) for others (Ethayarajh 2024, eq. 8),
    summed over replies; z is `batch.kl`."""
    is_desirable_B = replies.quality_B > 0
    above_B = rewards_B - loss.beta * batch.kl
    weights_B = torch.where(is_desirable_B, loss.desirable_weight, loss.undesirable_weight)
    right_B = torch.where(is_desirable_B, above_B, -above_B)
    total = (weights_B * (1.0 - right_B.sigmoid())).sum()
    sums = {
        "loss": total.detach(),
        "compared": torch.tensor(float(len(right_B))),
        "correct": (right_B > 0).sum(),
        "margin": right_B.detach().sum(),
    }
    return LossTerms(total, sums)


def mismatched(records: Sequence[int]) -> list[tuple[int, int]]:
    """For every record of a batch, in order, (its own number, the record whose reply it gets): the one before it, and
    the first record gets the last one's. TRL's rotation of a batch, so that both estimate the same KL."""
    return list(zip(records, [*records[-1:], *records[:-1]], strict=True))


def kto_kl(logprob_B: Tensor, reference_B: Tensor) -> Tensor:
    """max(0, mean of log(π(y'|x) / π_ref(y'|x))) over the mismatched replies of a batch (Ethayarajh 2024, section
    4.1)."""
    return (logprob_B - reference_B).mean().clamp(min=0.0)


PREFERENCE_OBJECTIVES: Mapping[str, PreferenceObjective] = {
    "dpo": PreferenceObjective(log_ratio, partial(_pairs, smoothed)),
    "ipo": PreferenceObjective(mean_log_ratio, partial(_pairs, squared)),
    "simpo": PreferenceObjective(mean_logprob, partial(_pairs, with_margin)),
    "orpo": PreferenceObjective(log_odds, partial(_pairs, odds_ratio)),
    "cpo": PreferenceObjective(logprob, partial(_pairs, smoothed)),
    "kto": PreferenceObjective(log_ratio, kto_loss),
}
