"""ReMax (Li 2024): REINFORCE with the reward of a greedy response as the baseline; no critic."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from orchestrator.algorithms.advantages import Advantages, Responses, returns_to_go
from orchestrator.algorithms.algorithm import Algorithm


class Remax(Algorithm):
    """No critic. Each prompt gets one more sample at temperature 0, which is scored and not learned from. The advantage
    of a token is the sum of the rewards from there on minus the reward of the greedy response (Li 2024, algorithm 1).
    """

    compares_samples: ClassVar[bool] = True
    greedy_samples: ClassVar[int] = 1

    name: Literal["remax"] = "remax"

    def advantages(self, responses: Responses) -> Advantages:
        returns_N = returns_to_go(responses)
        baselines_N = responses.greedy_rewards_R[responses.token_rows]
        columns = (returns_N - baselines_N, baselines_N, returns_N)
        return Advantages(*(column_N.astype(np.float32) for column_N in columns))
