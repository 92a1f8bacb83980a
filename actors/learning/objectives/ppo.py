"""PPO (Schulman 2017): the clipped surrogate, and the critic's clipped value loss."""

from __future__ import annotations

from torch import Tensor

from actors.learning.objectives.clipped import ClippedObjective
from actors.learning.objectives.losses import LossTerms, value_loss
from actors.learning.objectives.objective import Columns
from orchestrator.algorithms.ppo import Ppo


class PpoObjective(ClippedObjective):
    """PPO with a critic."""

    def __init__(self, algorithm: Ppo) -> None:
        super().__init__(algorithm)
        self._clip_value = algorithm.clip_value

    def critic_terms(self, values_N: Tensor, columns: Columns) -> LossTerms:
        return value_loss(values_N, columns["values"], columns["returns"], clip_value=self._clip_value)
