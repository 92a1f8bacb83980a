"""Estimates of KL(policy || reference) per token, as part of the loss. The forms in the reward are in
orchestrator/algorithms/kl.py.

Where tokens come from the policy itself, the gradients are in expectation:

    k1         0: it does not draw the policy anywhere
    k2         that of KL(policy || reference), per token
    k3         that of KL(reference || policy)
    unbiased   that of KL(policy || reference), per token, also where tokens come from an older policy

Shapes: N learned tokens, concatenated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from actors.learning.objectives.losses import bounded


def k1(logprobs_N: Tensor, ref_logprobs_N: Tensor, _old_logprobs_N: Tensor) -> Tensor:
    """new - ref"""
    return logprobs_N - ref_logprobs_N


def k2(logprobs_N: Tensor, ref_logprobs_N: Tensor, _old_logprobs_N: Tensor) -> Tensor:
    """(new - ref)² / 2, whose gradient is that of k1 in the reward (Liu 2025, "Rethinking KL regularization in
    RLHF")."""
    return 0.5 * (logprobs_N - ref_logprobs_N) ** 2


def k3(logprobs_N: Tensor, ref_logprobs_N: Tensor, _old_logprobs_N: Tensor) -> Tensor:
    """exp(ref - new) - 1 - (ref - new), with a bounded ref - new (Shao 2024, eq. 4)."""
    log_ratio_N = bounded(ref_logprobs_N - logprobs_N)
    return torch.expm1(log_ratio_N) - log_ratio_N


def unbiased(logprobs_N: Tensor, ref_logprobs_N: Tensor, old_logprobs_N: Tensor) -> Tensor:
    """exp(new - old) k3 (DeepSeek-AI 2025, DeepSeek-V3.2, section 3.1). The gradient, with r = exp(new - old), is
    r (new - ref) ∇new."""
    return bounded(logprobs_N - old_logprobs_N).exp() * k3(logprobs_N, ref_logprobs_N, old_logprobs_N)


KL_LOSSES: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "k1-loss": k1,
    "k2-loss": k2,
    "k3-loss": k3,
    "unbiased-loss": unbiased,
}
