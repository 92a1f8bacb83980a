"""Computes a prompt once for all its responses, which follow it in one line and do not see each other.

    tokens     p0 p1 p2 | a0 a1 | b0 b1 b2
    positions   0  1  2 |  3  4 |  3  4  5
    a sees     p0 p1 p2   a                    b sees   p0 p1 p2   b

The result equals that of separate rows up to rounding. The prompt is computed once instead of once per response. This
is known as prefix sharing or tree attention (Cai 2024, Medusa, section 3.1.2, for the mask).

Shapes: L lines of a micro-batch, T tokens of its longest line.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from actors.models.attention import NAME, has_full_attention, states_of
from orchestrator.planning.balance import share_prompt

_PROMPT, _NOBODY = 0, -1
_TOLERANCE = 0.1

Ints = npt.NDArray[np.int64]
Tokens = npt.NDArray[np.int32]


def bundles(prompts: Sequence[Tokens], responses: Sequence[Tokens], *, longest: int) -> list[tuple[int, ...]]:
    """Adjacent rows with the same prompt, in lines of at most `longest` tokens, if that is less work."""
    found: list[tuple[int, ...]] = []
    start = 0
    for row in range(1, len(prompts) + 1):
        if row == len(prompts) or not np.array_equal(prompts[row], prompts[start]):
            sizes = [len(response) for response in responses[start:row]]
            parts = share_prompt(len(prompts[start]), sizes, longest=longest)
            found += [tuple(start + i for i in part) for part in parts]
            start = row
    return found


def owners(prompt: int, responses: Sequence[int], width: int) -> tuple[Ints, Ints]:
    """(owner, position) of every token of a line: the owner is 0 for the prompt, i for response i, -1 for padding."""
    owner = np.full(width, _NOBODY, dtype=np.int64)
    position = np.zeros(width, dtype=np.int64)
    owner[:prompt] = _PROMPT
    position[:prompt] = np.arange(prompt)
    start = prompt
    for number, size in enumerate(responses, start=1):
        owner[start : start + size] = number
        position[start : start + size] = prompt + np.arange(size)
        start += size
    return owner, position


def visible(owner_LT: Tensor) -> Tensor:
    """Which key (last axis) each token sees: (L, 1, T, T), true for earlier ones of the prompt and of its own part."""
    length = owner_LT.shape[1]
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=owner_LT.device).tril_()
    keys_L1T, queries_LT1 = owner_LT.unsqueeze(1), owner_LT.unsqueeze(2)
    return ((keys_L1T == _PROMPT) | (keys_L1T == queries_LT1)).logical_and_(causal_TT).unsqueeze(1)


def can_share(language_model: Any) -> bool:
    """Whether a model computes the same states after a shared prompt as in separate rows; tries two rows.

    Models whose attention has windows, or uses other kernels than torch's, are not tried.
    """
    kernel = language_model.config.get_text_config()._attn_implementation
    if kernel not in ("sdpa", NAME) or not has_full_attention(language_model):
        return False
    prompt, responses = [1, 2, 3], [[4, 5, 6], [7, 8, 9]]
    owner, position = (torch.from_numpy(array)[None] for array in owners(3, [3, 3], 9))
    device = next(language_model.parameters()).device
    states = partial(states_of, language_model)
    with torch.no_grad():
        try:
            line = states(
                [*prompt, *responses[0], *responses[1]],
                position_ids=position.to(device),
                attention_mask=visible(owner.to(device)),
            )
        except (TypeError, ValueError, RuntimeError):
            return False
        apart = torch.cat([states([*prompt, *responses[0]]), states([*prompt, *responses[1]])[len(prompt) :]])
    return bool((line - apart).norm() <= _TOLERANCE * apart.norm())
