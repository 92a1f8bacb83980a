"""The clipped surrogate objective, with what the algorithms of this family can switch on."""

from __future__ import annotations

from torch import Tensor

from actors.learning.objectives.corrections import correction
from actors.learning.objectives.kl import KL_LOSSES
from actors.learning.objectives.losses import LossTerms, policy_loss, whiten
from actors.learning.objectives.objective import LearnJob, Objective, Rows
from orchestrator.algorithms.algorithm import Algorithm


class ClippedObjective(Objective):
    """Clipped surrogate, entropy bonus, and KL to the reference if it is part of the loss.

    The surrogate's tokens are weighted by the correction (corrections.py); all three parts by the aggregation:
    with n learned tokens in a row, R rows and N tokens in the minibatch, over all ranks,

        token      Σ_tokens / N
        sample     Σ_rows (Σ_tokens / n) / R
        constant   Σ_rows (Σ_tokens / longest response) / R
    """

    policy_columns = ("old_logprobs", "ref_logprobs", "engine_logprobs", "advantages")

    def __init__(self, algorithm: Algorithm) -> None:
        self.settings = algorithm

    def policy_terms(self, logprobs_N: Tensor, entropy_N: Tensor, rows: Rows, job: LearnJob) -> LossTerms:
        settings, columns = self.settings, rows.columns
        sums: dict[str, Tensor] = {"entropy": entropy_N.detach().sum()}
        shares_N = aggregation_weights(settings.aggregation, rows)
        weights_N = shares_N
        corrected = correction(settings, columns["old_logprobs"], columns["engine_logprobs"], rows.lengths_B)
        if corrected is not None:
            weights_N = corrected.weights_N if shares_N is None else corrected.weights_N * shares_N
            sums |= corrected.sums
        advantages_N = columns["advantages"]
        if settings.whitens:
            advantages_N = whiten(advantages_N, job.advantage_mean, job.advantage_std)
        surrogate = self.surrogate(logprobs_N, advantages_N, rows, weights_N)
        loss = surrogate.loss
        if settings.entropy_coefficient:
            loss = loss - settings.entropy_coefficient * _weighted(entropy_N, shares_N).sum()
        if not settings.kl_in_reward:
            estimate = KL_LOSSES[settings.kl_estimator]
            kl_N = estimate(logprobs_N, columns["ref_logprobs"], columns["old_logprobs"])
            reference_kl = _weighted(kl_N, shares_N).sum()
            loss = loss + job.kl_coefficient * reference_kl
            sums[f"reference_kl_{settings.kl_estimator.removesuffix('-loss')}"] = reference_kl.detach()
        return LossTerms(loss, {**surrogate.sums, **sums, "loss": loss.detach()}, surrogate.maxima)

    def surrogate(self, logprobs_N: Tensor, advantages_N: Tensor, rows: Rows, weights_N: Tensor | None) -> LossTerms:
        """The policy's loss without entropy and KL. See policy_loss for its metrics."""
        settings = self.settings
        return policy_loss(
            logprobs_N,
            rows.columns["old_logprobs"],
            advantages_N,
            clip_ratio=settings.clip_ratio,
            clip_ratio_high=settings.clip_ratio_high,
            dual_clip=settings.dual_clip,
            weights_N=weights_N,
        )


def aggregation_weights(aggregation: str, rows: Rows) -> Tensor | None:
    """Weights of tokens whose sum, divided by the tokens of the minibatch, is the aggregated loss. None: all are 1."""
    if aggregation == "token":
        return None
    lengths_B = rows.lengths_B
    if aggregation == "sample":
        return (rows.mean_length / lengths_B).repeat_interleave(lengths_B)
    share_B = (lengths_B > 0).float() * (rows.mean_length / rows.max_new_tokens)
    return share_B.repeat_interleave(lengths_B)


def _weighted(values_N: Tensor, weights_N: Tensor | None) -> Tensor:
    return values_N if weights_N is None else values_N * weights_N
