"""PPO (Schulman 2017): the clipped surrogate with whitened advantages, and the critic's clipped value loss."""

from __future__ import annotations

from torch import Tensor

from actors.learning.objectives.clipped import ClippedObjective
from actors.learning.objectives.losses import LossTerms, value_loss, whiten
from actors.learning.objectives.objective import Columns, LearnJob
from orchestrator.algorithms.ppo import Ppo


class PpoObjective(ClippedObjective):
    """PPO with a critic."""

    def __init__(self, algorithm: Ppo) -> None:
        super().__init__(algorithm)
        self._whitens = algorithm.whiten_advantages
        self._clip_value = algorithm.clip_value

    def policy_terms(self, logprobs_N: Tensor, entropy_N: Tensor, columns: Columns, job: LearnJob) -> LossTerms:
        if self._whitens:
            whitened_N = whiten(columns["advantages"], job.advantage_mean, job.advantage_std)
            columns = {**columns, "advantages": whitened_N}
        return super().policy_terms(logprobs_N, entropy_N, columns, job)

    def critic_terms(self, values_N: Tensor, columns: Columns) -> LossTerms:
        return value_loss(values_N, columns["values"], columns["returns"], clip_value=self._clip_value)
