"""The clipped surrogate objective of PPO without a critic (GRPO, RLOO)."""

from __future__ import annotations

from torch import Tensor

from actors.learning.objectives.losses import LossTerms, importance_weights, kl_loss, policy_loss
from actors.learning.objectives.objective import Columns, LearnJob, Objective
from orchestrator.algorithms.algorithm import Algorithm


class ClippedObjective(Objective):
    """Clipped surrogate, entropy bonus, and KL to the reference if it is part of the loss."""

    policy_columns = ("old_logprobs", "ref_logprobs", "engine_logprobs", "advantages")

    def __init__(self, algorithm: Algorithm) -> None:
        self._settings = algorithm

    def policy_terms(self, logprobs_N: Tensor, entropy_N: Tensor, columns: Columns, job: LearnJob) -> LossTerms:
        settings = self._settings
        weights_N = None
        sums: dict[str, Tensor] = {"entropy": entropy_N.detach().sum()}
        if settings.importance_cap is not None:
            weights_N = importance_weights(columns["old_logprobs"], columns["engine_logprobs"], settings.importance_cap)
            sums["importance_weight_mean"] = weights_N.sum()
            sums["importance_capped_fraction"] = (weights_N >= settings.importance_cap).sum()
        clipped = policy_loss(
            logprobs_N,
            columns["old_logprobs"],
            columns["advantages"],
            clip_ratio=settings.clip_ratio,
            importance_weights_N=weights_N,
        )
        loss = clipped.loss
        if settings.entropy_coefficient:
            loss = loss - settings.entropy_coefficient * entropy_N.sum()
        if settings.kl_estimator == "k3-loss":
            reference_kl = kl_loss(logprobs_N, columns["ref_logprobs"])
            loss = loss + job.kl_coefficient * reference_kl
            sums["reference_kl_k3"] = reference_kl.detach()
        return LossTerms(loss, {**clipped.sums, **sums, "loss": loss.detach()}, clipped.maxima)
