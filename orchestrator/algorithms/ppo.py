"""PPO (Schulman 2017) with a critic and generalised advantage estimation.

Shapes: as in advantages.py; T tokens of one row.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from orchestrator.algorithms.advantages import Advantages, Floats, Offsets, Responses
from orchestrator.algorithms.algorithm import Algorithm
from orchestrator.config.base import Fraction, PositiveNumber


class Ppo(Algorithm):
    """PPO with a critic and generalised advantage estimation."""

    needs_critic: ClassVar[bool] = True

    name: Literal["ppo"] = "ppo"
    gamma: Fraction = 1.0
    """Discount."""
    lam: Fraction = 0.95
    """GAE lambda."""
    whiten_advantages: bool = True
    """Whiten advantages over the whole batch."""
    clip_value: PositiveNumber | None = 0.2
    """Value clip range. Null: off."""

    @property
    def whitens(self) -> bool:
        return self.whiten_advantages

    def advantages(self, responses: Responses) -> Advantages:
        advantages_N, returns_N = gae_rows(
            responses.token_rewards_N,
            responses.values_N,
            responses.offsets_R1,
            responses.last_values_R,
            self.gamma,
            self.lam,
        )
        return Advantages(advantages_N, responses.values_N, returns_N)


def gae(
    token_rewards_T: Floats, values_T: Floats, bootstrap_value: float, gamma: float, lam: float
) -> tuple[Floats, Floats]:
    """Generalised advantage estimation (Schulman 2016, eq. 16) of one response.

    Args:
        token_rewards_T: reward of each response token, including the KL penalty.
        values_T: V(s_t) in the state in which token t is chosen.
        bootstrap_value: V after the last token: 0 after EOS, the critic's value if the response was truncated.

    Returns:
        (advantages_T, returns_T) with returns = advantages + values; computed in float64, returned as float32.
    """
    offsets_R1 = np.array([0, len(token_rewards_T)], dtype=np.int64)
    bootstrap_R = np.array([bootstrap_value], dtype=np.float32)
    return gae_rows(token_rewards_T, values_T, offsets_R1, bootstrap_R, gamma, lam)


def gae_rows(
    token_rewards_N: Floats, values_N: Floats, offsets_R1: Offsets, bootstrap_values_R: Floats, gamma: float, lam: float
) -> tuple[Floats, Floats]:
    """`gae` of many rows, vectorised: the recursion runs over the distance from each row's end."""
    rewards_N = np.asarray(token_rewards_N, dtype=np.float64)
    values64_N = np.asarray(values_N, dtype=np.float64)
    lengths_R = np.diff(offsets_R1)
    filled_R = np.flatnonzero(lengths_R > 0)
    last_R = offsets_R1[1:][filled_R] - 1
    next_values_N = np.append(values64_N[1:], 0.0)[: len(values64_N)]
    next_values_N[last_R] = np.asarray(bootstrap_values_R, dtype=np.float64)[filled_R]
    deltas_N = rewards_N + gamma * next_values_N - values64_N

    by_length = np.argsort(-lengths_R[filled_R], kind="stable")
    last_R = last_R[by_length]
    descending_R = lengths_R[filled_R][by_length]
    running_R = np.zeros(len(last_R))
    advantages_N = np.zeros_like(deltas_N)
    for distance in range(int(descending_R[0]) if len(descending_R) else 0):
        num_active = int(np.searchsorted(-descending_R, -distance, side="left"))
        index = last_R[:num_active] - distance
        running_R[:num_active] = deltas_N[index] + gamma * lam * running_R[:num_active]
        advantages_N[index] = running_R[:num_active]
    return advantages_N.astype(np.float32), (advantages_N + values64_N).astype(np.float32)
