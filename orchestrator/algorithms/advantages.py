"""Advantages over response tokens.

Shapes: R rows, N = all response tokens of all rows laid end to end, R1 = R + 1 offsets (row i is [o[i], o[i+1])),
T tokens of one row, G groups: the rows of one prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Offsets = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]
GroupAdvantage = Callable[[Doubles, npt.NDArray[np.int64]], tuple[Doubles, Doubles]]


def gae(
    token_rewards_T: Floats, values_T: Floats, bootstrap_value: float, gamma: float, lam: float
) -> tuple[Floats, Floats]:
    """Generalised advantage estimation (Schulman 2016, eq. 16) of one response.

    Args:
        token_rewards_T: reward for choosing each response token, KL penalty included.
        values_T: V(s_t) in the state in which token t is chosen.
        bootstrap_value: V after the last token: 0 when the response ended by EOS, the critic's value when it was cut.

    Returns:
        (advantages_T, returns_T) with returns = advantages + values; computed in float64, returned as float32.
    """
    offsets_R1 = np.array([0, len(token_rewards_T)], dtype=np.int64)
    bootstrap_R = np.array([bootstrap_value], dtype=np.float32)
    return gae_rows(token_rewards_T, values_T, offsets_R1, bootstrap_R, gamma, lam)


def gae_rows(
    token_rewards_N: Floats, values_N: Floats, offsets_R1: Offsets, bootstrap_values_R: Floats, gamma: float, lam: float
) -> tuple[Floats, Floats]:
    """`gae` of many rows at once: the recursion runs over the distance from the end, all rows that long together."""
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


def whiten(advantages: Floats, mean: float, std: float) -> Floats:
    """(a - mean) / (std + 1e-8) with moments of the whole batch, so that it does not depend on sharding."""
    return ((np.asarray(advantages, dtype=np.float64) - mean) / (std + 1e-8)).astype(np.float32)


def grpo(returns_R: Doubles, group_R: npt.NDArray[np.int64]) -> tuple[Doubles, Doubles]:
    """Group-relative advantages (Shao 2024, DeepSeekMath, section 4.1.2): (R - mean) / (std + 1e-4), the standard
    deviation with n - 1. A group of one has advantage 0.

    Args:
        group_R: which group each row is of; any numbers.

    Returns:
        (advantage, baseline) of every row; the baseline is the group's mean.
    """
    sizes_R, means_R, index_R = _group_means(returns_R, group_R)
    deviations_R = returns_R - means_R
    variances_R = np.bincount(index_R, weights=deviations_R**2)[index_R] / np.maximum(sizes_R - 1.0, 1.0)
    return deviations_R / (np.sqrt(variances_R) + 1e-4), means_R


def rloo(returns_R: Doubles, group_R: npt.NDArray[np.int64]) -> tuple[Doubles, Doubles]:
    """REINFORCE leave-one-out (Ahmadian 2024, eq. 8): the return minus the mean of the group's others. As `grpo`; the
    baseline of a group of one is its own return."""
    sizes_R, means_R, _ = _group_means(returns_R, group_R)
    others_R = (means_R * sizes_R - returns_R) / np.maximum(sizes_R - 1.0, 1.0)
    baselines_R = np.where(sizes_R > 1, others_R, returns_R)
    return returns_R - baselines_R, baselines_R


def _group_means(returns_R: Doubles, group_R: npt.NDArray[np.int64]) -> tuple[Doubles, Doubles, npt.NDArray[np.int64]]:
    """Of each row: its group's size, its group's mean, and its group's number among G."""
    _, index_R = np.unique(group_R, return_inverse=True)
    sizes_G = np.bincount(index_R).astype(np.float64)
    means_G = np.bincount(index_R, weights=returns_R) / sizes_G
    return sizes_G[index_R], means_G[index_R], index_R


GROUP_ADVANTAGES: Mapping[str, GroupAdvantage] = {"grpo": grpo, "rloo": rloo}
