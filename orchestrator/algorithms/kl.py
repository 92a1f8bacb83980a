"""Estimators of KL(policy || other) from tokens sampled by the policy (Schulman, "Approximating KL divergence", 2020),
and the adaptive controller of the KL coefficient (Ziegler 2019, section 2.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


LOG_RATIO_BOUND = 20.0
"""Log-ratios are clipped to ± this before they are exponents of a loss or a reward, as in verl and OpenRLHF."""


def bounded(log_ratio: Floats) -> Floats:
    return np.clip(log_ratio, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def k1(logprobs: Floats, other_logprobs: Floats) -> Floats:
    """log p - log q: unbiased, can be negative."""
    return logprobs - other_logprobs


def k2(logprobs: Floats, other_logprobs: Floats) -> Floats:
    """(log p - log q)² / 2: biased, never negative."""
    return np.float32(0.5) * (logprobs - other_logprobs) ** 2


def k3(logprobs: Floats, other_logprobs: Floats) -> Floats:
    """q/p - 1 - log(q/p): unbiased, never negative. log(q/p) is bounded."""
    log_ratio = bounded(other_logprobs - logprobs)
    estimate: Floats = np.expm1(log_ratio) - log_ratio
    return estimate


def adapted_coefficient(
    coefficient: float, observed_kl: float, *, target: float, horizon_samples: int, num_samples: int
) -> float:
    """The KL coefficient of the next step (Ziegler 2019): increased if KL per response is above target, else decreased.

    error = clip(KL / target - 1, ±0.2);  coefficient · (1 + error · num_samples / horizon_samples)
    """
    error = min(max(observed_kl / target - 1.0, -0.2), 0.2)
    return coefficient * (1.0 + error * num_samples / horizon_samples)


ESTIMATORS: Mapping[str, Callable[[Floats, Floats], Floats]] = {"k1": k1, "k2": k2, "k3": k3}
