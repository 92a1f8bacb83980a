"""GRPO (Shao 2024, DeepSeekMath), Dr. GRPO (Liu 2025) and DAPO (Yu 2025): compare a prompt's samples; no critic."""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal

import numpy as np

from orchestrator.algorithms.advantages import Advantages, Doubles, Groups, Responses, group_means, per_response
from orchestrator.algorithms.algorithm import Aggregation, Algorithm
from orchestrator.config.base import Fraction, NonNegative, NonNegativeNumber, PositiveNumber


class GroupRelative(Algorithm):
    """Advantages of GRPO: the return minus the mean return of the prompt's responses, divided by their standard
    deviation."""

    compares_samples: ClassVar[bool] = True

    divide_by_std: bool = True
    """Divide advantages by the standard deviation of the returns of the prompt's responses."""

    def advantages(self, responses: Responses) -> Advantages:
        return per_response(responses, partial(grpo, divide_by_std=self.divide_by_std))


class Grpo(GroupRelative):
    """No critic. The advantage is the return minus the mean return of the prompt's responses, divided by their standard
    deviation."""

    name: Literal["grpo"] = "grpo"


class DrGrpo(GroupRelative):
    """GRPO without its two biases (Liu 2025, section 3): prompts on which nearly all samples agree weigh no more than
    others, and the weight of a token does not depend on the length of its response. The paper has no KL penalty."""

    name: Literal["dr-grpo"] = "dr-grpo"
    divide_by_std: bool = False
    aggregation: Aggregation = "constant"
    kl_coefficient: NonNegativeNumber = 0.0


class Dapo(GroupRelative):
    """GRPO with the changes of Yu 2025, eqs. 8 to 13: the range above 1 is wider, prompts whose samples all have the
    same reward are replaced, all tokens weigh the same, and long responses are penalised before they are cut. No KL
    penalty."""

    name: Literal["dapo"] = "dapo"
    clip_ratio_high: PositiveNumber | None = 0.28
    overlong_fraction: Fraction = 0.2
    filter_rounds: NonNegative | None = 3
    kl_coefficient: NonNegativeNumber = 0.0


def grpo(returns_R: Doubles, group_R: Groups, *, divide_by_std: bool = True) -> tuple[Doubles, Doubles]:
    """Group-relative advantages (Shao 2024, DeepSeekMath, section 4.1.2): (R - mean) / (std + 1e-4), with the sample
    standard deviation (n - 1); or R - mean (Liu 2025, section 3). A group of one has advantage 0.

    Args:
        group_R: arbitrary group id of each row.

    Returns:
        (advantage, baseline) of each row; the baseline is the group's mean.
    """
    sizes_R, means_R, index_R = group_means(returns_R, group_R)
    deviations_R = returns_R - means_R
    if not divide_by_std:
        return deviations_R, means_R
    variances_R = np.bincount(index_R, weights=deviations_R**2)[index_R] / np.maximum(sizes_R - 1.0, 1.0)
    return deviations_R / (np.sqrt(variances_R) + 1e-4), means_R
