"""GRPO (Shao 2024, DeepSeekMath): compares the samples of a prompt; no critic."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from orchestrator.algorithms.advantages import Advantages, Doubles, Groups, Responses, group_means, per_response
from orchestrator.algorithms.algorithm import Algorithm


class Grpo(Algorithm):
    """No critic. The advantage is the return minus the mean return of the prompt's responses, divided by their standard
    deviation."""

    compares_samples: ClassVar[bool] = True

    name: Literal["grpo"] = "grpo"

    def advantages(self, responses: Responses) -> Advantages:
        return per_response(responses, grpo)


def grpo(returns_R: Doubles, group_R: Groups) -> tuple[Doubles, Doubles]:
    """Group-relative advantages (Shao 2024, DeepSeekMath, section 4.1.2): (R - mean) / (std + 1e-4), with the sample
    standard deviation (n - 1). A group of one has advantage 0.

    Args:
        group_R: arbitrary group id of each row.

    Returns:
        (advantage, baseline) of each row; the baseline is the group's mean.
    """
    sizes_R, means_R, index_R = group_means(returns_R, group_R)
    deviations_R = returns_R - means_R
    variances_R = np.bincount(index_R, weights=deviations_R**2)[index_R] / np.maximum(sizes_R - 1.0, 1.0)
    return deviations_R / (np.sqrt(variances_R) + 1e-4), means_R
