"""The random ragged batch that all sides compute with, and its two layouts.

Shapes: B rows, T tokens of the longest; N learned tokens, laid end to end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SAMPLES_PER_PROMPT = 4
MAX_NEW_TOKENS = 14
PART_WEIGHTS = {"answer": 1.0, "format": 0.3}
SEEDS = range(3)
Batch = dict[str, Tensor]
Results = dict[str, list[Tensor]]


def batch(seed: int, *, gaps: bool, num_prompts: int = 8) -> Batch:
    """Matrices (B, T) of numbers, `mask_BT` of the learned tokens, and numbers per row.

    Args:
        gaps: tokens within a response that are not learned from.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, longest = num_prompts * SAMPLES_PER_PROMPT, MAX_NEW_TOKENS

    def normal(mean: float, std: float) -> Tensor:
        return mean + std * torch.randn(rows, longest, generator=generator)

    lengths_B = torch.randint(1, longest + 1, (rows,), generator=generator)
    mask_BT = torch.arange(longest) < lengths_B[:, None]
    if gaps:
        inner_BT = torch.arange(longest) < lengths_B[:, None] - 1
        mask_BT &= ~(inner_BT & (torch.rand(rows, longest, generator=generator) < 0.3))
    old_BT = -normal(1.2, 0.6).abs() - 0.02
    # Some tokens are far apart, so that every bound of a ratio is met: with seed 2 that of the exponent too.
    is_far_BT = torch.rand(rows, longest, generator=generator) < 0.1
    sign_BT = torch.sign(normal(0.0, 1.0))
    near_BT = normal(0.0, 0.2)
    return {
        "mask_BT": mask_BT.float(),
        "old_BT": old_BT,
        "new_BT": old_BT + near_BT + (30.0 if seed == 2 else 2.0) * is_far_BT * sign_BT,
        "near_BT": old_BT + near_BT,
        "ref_BT": old_BT + normal(0.0, 0.4),
        "engine_BT": torch.minimum(old_BT + normal(0.0, 0.3), torch.tensor(-1e-3)),
        "advantages_BT": normal(0.0, 1.0),
        "row_advantages_B": normal(0.0, 1.0)[:, 0],
        "values_BT": normal(0.0, 0.5),
        "old_values_BT": normal(0.0, 0.5),
        "returns_BT": normal(0.5, 0.5),
        "rewards_B": normal(0.3, 1.0)[:, 0],
        "greedy_B": normal(0.0, 1.0)[:, 0]
        .reshape(-1, SAMPLES_PER_PROMPT)[:, :1]
        .repeat(1, SAMPLES_PER_PROMPT)
        .flatten(),
    }


def parts_of(data: Batch) -> Batch:
    """Parts of the rewards: one of 0 and 1, and one on another scale."""
    return {"answer": (data["rewards_B"] > 0.0).float(), "format": 10.0 * data["row_advantages_B"]}


def on_last(rewards_B: Tensor, mask_BT: Tensor) -> Tensor:
    """Each row's reward at its last learned token."""
    last_B = (mask_BT * torch.arange(mask_BT.shape[1])).argmax(1)
    return torch.zeros_like(mask_BT).scatter_(1, last_B[:, None], rewards_B[:, None])


def laid_end_to_end(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return values_BT[mask_BT.bool()]


def differentiated(loss: Any, at_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(value of loss(x), its gradient at the learned tokens)"""
    x_BT = at_BT.clone().requires_grad_()
    value = loss(x_BT)
    value.backward()
    assert x_BT.grad is not None
    return value.detach(), laid_end_to_end(x_BT.grad, mask_BT)
