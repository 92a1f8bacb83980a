"""Input and output of an algorithm's advantage computation.

Shapes: R rows; N = learned tokens of all rows, concatenated; R1 = R + 1 offsets (row i is [o[i], o[i+1])); G groups,
where a group is the rows of one prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Offsets = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]
Groups = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Responses:
    """The learned tokens of responses, without tokens from an environment.

    Args:
        token_rewards_N: reward of each token, including the KL penalty if it is part of the reward. The sequence reward
            is added to the last token.
        group_R: arbitrary id of each row's prompt.
        values_N: the critic's V(s_t) in the state in which token t is chosen; empty without a critic.
        last_values_R: V after the last token, 0 if the response is complete; empty without a critic.
        greedy_rewards_R: sequence reward of the greedy sample of each row's prompt, if the algorithm draws one.
        parts: parts of each row's reward, those that the algorithm names.
        shaping_R: what penalties of length add to each row's reward; empty if it names no parts.
    """

    token_rewards_N: Floats
    offsets_R1: Offsets
    group_R: Groups
    values_N: Floats
    last_values_R: Floats
    greedy_rewards_R: Doubles = field(default_factory=lambda: np.zeros(0))
    parts: Mapping[str, Doubles] = field(default_factory=dict)
    shaping_R: Doubles = field(default_factory=lambda: np.zeros(0))

    @property
    def token_rows(self) -> npt.NDArray[np.intp]:
        """The row of each token."""
        lengths_R = np.diff(self.offsets_R1)
        return np.repeat(np.arange(len(lengths_R)), lengths_R)


@dataclass(frozen=True, eq=False)
class Advantages:
    """Args:
    advantages_N: before whitening.
    values_N: baselines of the returns: the critic's values, or others.
    returns_N: targets of the critic.
    """

    advantages_N: Floats
    values_N: Floats
    returns_N: Floats


def per_response(responses: Responses, compare: Callable[[Doubles, Groups], tuple[Doubles, Doubles]]) -> Advantages:
    """Computes one advantage for all tokens of a response, from undiscounted returns.

    Args:
        compare: (returns_R, group_R) -> (advantages_R, baselines_R)
    """
    row_N, num_rows = responses.token_rows, len(responses.group_R)
    returns_R = np.bincount(row_N, weights=responses.token_rewards_N, minlength=num_rows).astype(np.float64)
    advantages_R, baselines_R = compare(returns_R, responses.group_R)
    return Advantages(*(column_R.astype(np.float32)[row_N] for column_R in (advantages_R, baselines_R, returns_R)))


def returns_to_go(responses: Responses) -> Doubles:
    """Per token, the sum of the rewards of this token and of all later tokens of its response, undiscounted."""
    sums_N1 = np.concatenate([[0.0], np.cumsum(responses.token_rewards_N, dtype=np.float64)])
    after_N: Doubles = sums_N1[responses.offsets_R1[1:]][responses.token_rows] - sums_N1[:-1]
    return after_N


def group_means(returns_R: Doubles, group_R: Groups) -> tuple[Doubles, Doubles, Groups]:
    """Size, mean return and index (below G) of each row's group."""
    _, index_R = np.unique(group_R, return_inverse=True)
    sizes_G = np.bincount(index_R).astype(np.float64)
    means_G = np.bincount(index_R, weights=returns_R) / sizes_G
    return sizes_G[index_R], means_G[index_R], index_R
