"""REINFORCE++ (Hu 2025) and its form with a baseline: advantages are whitened over the whole step; no critic."""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal

import numpy as np

from orchestrator.algorithms.advantages import Advantages, Responses, per_response, returns_to_go
from orchestrator.algorithms.algorithm import Algorithm, KlEstimator
from orchestrator.algorithms.grpo import grpo


class ReinforcePlusPlus(Algorithm):
    """No critic, and no comparison of samples: one sample per prompt is enough. The advantage of a token is the sum of
    the rewards from there on, A_t = r - β Σ_{i>=t} KL_i (Hu 2025, section 3), whitened over the whole step."""

    name: Literal["reinforce++"] = "reinforce++"

    @property
    def whitens(self) -> bool:
        return True

    def advantages(self, responses: Responses) -> Advantages:
        returns_N = returns_to_go(responses).astype(np.float32)
        return Advantages(returns_N, np.zeros_like(returns_N), returns_N)


class ReinforcePlusPlusBaseline(Algorithm):
    """REINFORCE++ with several samples per prompt: the advantage is the return minus the mean return of the prompt's
    responses, whitened over the whole step (Hu 2025, section 3). The KL is in the loss, by k2."""

    compares_samples: ClassVar[bool] = True

    name: Literal["reinforce++-baseline"] = "reinforce++-baseline"
    kl_estimator: KlEstimator = "k2-loss"

    @property
    def whitens(self) -> bool:
        return True

    def advantages(self, responses: Responses) -> Advantages:
        return per_response(responses, partial(grpo, divide_by_std=False))
