"""RLOO (Ahmadian 2024): REINFORCE with the mean of a prompt's other samples as the baseline; no critic."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from orchestrator.algorithms.advantages import Advantages, Doubles, Groups, Responses, group_means, per_response
from orchestrator.algorithms.algorithm import Algorithm


class Rloo(Algorithm):
    """No critic. The advantage is the return minus the mean return of the prompt's other responses."""

    compares_samples: ClassVar[bool] = True

    name: Literal["rloo"] = "rloo"

    def advantages(self, responses: Responses) -> Advantages:
        return per_response(responses, rloo)


def rloo(returns_R: Doubles, group_R: Groups) -> tuple[Doubles, Doubles]:
    """REINFORCE leave-one-out (Ahmadian 2024, eq. 8): the return minus the mean return of the group's other rows.
    Arguments and results as `grpo`; the baseline of a group of one is its own return."""
    sizes_R, means_R, _ = group_means(returns_R, group_R)
    others_R = (means_R * sizes_R - returns_R) / np.maximum(sizes_R - 1.0, 1.0)
    baselines_R = np.where(sizes_R > 1, others_R, returns_R)
    return returns_R - baselines_R, baselines_R
