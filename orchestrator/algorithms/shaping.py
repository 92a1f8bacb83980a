"""From the score of a sample to the rewards of its tokens.

Shapes: R rows; N = learned tokens of all rows, concatenated; R1 = R + 1 offsets.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from orchestrator.algorithms import kl
from orchestrator.algorithms.advantages import Doubles, Floats, Offsets
from orchestrator.algorithms.algorithm import Algorithm

Mask = npt.NDArray[np.bool_]
Lengths = npt.NDArray[np.int64]


def shaped_rewards(
    reward_R: Floats,
    truncated_R: Mask,
    lengths_R: Lengths,
    algorithm: Algorithm,
    *,
    reward_clip: float | None,
    max_new_tokens: int,
) -> Doubles:
    """Rewards of samples: clipped to ± reward_clip, then less the penalties of truncated and of overlong responses."""
    final_R = clipped(reward_R.astype(np.float64), reward_clip)
    if algorithm.truncated == "penalise":
        final_R = final_R - algorithm.truncation_penalty * truncated_R
    if algorithm.overlong_fraction:
        share_R = overlong_share(
            lengths_R, max_new_tokens=max_new_tokens, overlong_fraction=algorithm.overlong_fraction
        )
        final_R = final_R - algorithm.truncation_penalty * share_R
    return final_R


def clipped(reward_R: Doubles, reward_clip: float | None) -> Doubles:
    return reward_R if reward_clip is None else np.clip(reward_R, -reward_clip, reward_clip)


def overlong_share(lengths_R: Lengths, *, max_new_tokens: int, overlong_fraction: float) -> Doubles:
    """Share of the overlong penalty of responses of these lengths (Yu 2025, DAPO, eq. 13, negated): 0 up to the buffer
    of overlong_fraction · max_new_tokens tokens at the end, then linear, 1 at max_new_tokens."""
    buffer = overlong_fraction * max_new_tokens
    share_R: Doubles = np.clip((lengths_R - (max_new_tokens - buffer)) / buffer, 0.0, 1.0)
    return share_R


def token_rewards(
    reward: float, old_logprobs: Floats, ref_logprobs: Floats, kl_coefficient: float, estimator: str = "k1"
) -> Floats:
    """Token rewards of one response: -kl_coefficient · k1 (k2, k3) for each token, plus the sequence reward for the
    last."""
    offsets_R1 = np.array([0, len(old_logprobs)], dtype=np.int64)
    return token_rewards_rows(np.array([reward]), old_logprobs, ref_logprobs, offsets_R1, kl_coefficient, estimator)


def token_rewards_rows(
    reward_R: Doubles, old_N: Floats, ref_N: Floats, offsets_R1: Offsets, kl_coefficient: float, estimator: str
) -> Floats:
    """`token_rewards` of many rows."""
    rewards_N = -kl_coefficient * kl.ESTIMATORS[estimator](np.asarray(old_N, np.float64), np.asarray(ref_N, np.float64))
    filled_R = np.diff(offsets_R1) > 0
    rewards_N[offsets_R1[1:][filled_R] - 1] += reward_R[filled_R]
    return rewards_N.astype(np.float32)
