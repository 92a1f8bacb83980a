"""What algorithms make advantages from, and what they give back.

Shapes: R rows, N = learned tokens of all rows laid end to end, R1 = R + 1 offsets (row i is [o[i], o[i+1])), G groups:
the rows of one prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Offsets = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]
Groups = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Responses:
    """The learned tokens of responses. Tokens that an environment wrote are not among them.

    Args:
        token_rewards_N: reward for choosing each token, with the KL penalty where it is in the reward; the reward of
            the whole response is on its last token.
        group_R: number of the prompt that each row answers; any numbers.
        values_N: V(s_t) of the critic in the state in which token t is chosen; empty without a critic.
        last_values_R: V after the last token: 0 where the response ended by itself; empty without a critic.
    """

    token_rewards_N: Floats
    offsets_R1: Offsets
    group_R: Groups
    values_N: Floats
    last_values_R: Floats


@dataclass(frozen=True, eq=False)
class Advantages:
    """Args:
    advantages_N: before whitening.
    values_N: what a return is compared with: the critic's value, or another baseline.
    returns_N: what the critic learns.
    """

    advantages_N: Floats
    values_N: Floats
    returns_N: Floats


def per_response(responses: Responses, compare: Callable[[Doubles, Groups], tuple[Doubles, Doubles]]) -> Advantages:
    """One advantage for all tokens of a response, whose return is undiscounted.

    Args:
        compare: (returns_R, group_R) -> (advantages_R, baselines_R)
    """
    lengths_R = np.diff(responses.offsets_R1)
    row_N = np.repeat(np.arange(len(lengths_R)), lengths_R)
    returns_R = np.bincount(row_N, weights=responses.token_rewards_N, minlength=len(lengths_R)).astype(np.float64)
    advantages_R, baselines_R = compare(returns_R, responses.group_R)
    return Advantages(*(column_R.astype(np.float32)[row_N] for column_R in (advantages_R, baselines_R, returns_R)))


def group_means(returns_R: Doubles, group_R: Groups) -> tuple[Doubles, Doubles, Groups]:
    """Of each row: its group's size, its group's mean, and its group's number among G."""
    _, index_R = np.unique(group_R, return_inverse=True)
    sizes_G = np.bincount(index_R).astype(np.float64)
    means_G = np.bincount(index_R, weights=returns_R) / sizes_G
    return sizes_G[index_R], means_G[index_R], index_R
