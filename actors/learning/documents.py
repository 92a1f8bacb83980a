"""Several rows in one line without padding: they do not see each other, and each begins at position 0.

    tokens     a0 a1 a2 | b0 b1 | c0 c1 c2 c3
    positions   0  1  2 |  0  1 |  0  1  2  3
    bounds      0         3       5             9

The result equals that of separate rows up to rounding. `arguments` is the one place that says where rows begin, in
the terms of transformers' kernels for sequences of different lengths (`cu_seq_lens_q` and so on; Dao 2023,
FlashAttention-2). actors/models/attention.py reads them (docs/adr/0017-packing.md).

Shapes: T tokens of all rows of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from actors.models.attention import NAME, has_full_attention, states_of

_TOLERANCE = 0.1
_PROBE = ([1, 2, 3], [4, 5, 6, 7], [8, 9])


def arguments(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """What a model of transformers takes with one line (1, T) of rows with these numbers of tokens."""
    positions = np.concatenate([np.arange(length) for length in lengths])
    bounds = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32, device=device)
    return {
        "position_ids": torch.from_numpy(positions)[None].to(device),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        # Four axes: transformers hands it on instead of making a mask of T x T, and the kernel does not read it.
        # With a model that keeps the bounds from the kernel all tokens see each other, which `can_pack` finds out.
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
    }


def can_pack(language_model: Any) -> bool:
    """Whether a model computes the same states for rows in one line as for separate rows; tries three rows.

    The difference must be small beside that of a line whose rows see each other. Models whose attention has windows
    or uses kernels that do not take bounds are not tried.
    """
    device = next(language_model.parameters()).device
    kernel = language_model.config.get_text_config()._attn_implementation
    if kernel != NAME or not has_full_attention(language_model):
        return False
    states = partial(states_of, language_model)
    line = [token for row in _PROBE for token in row]
    with torch.no_grad():
        try:
            packed = states(line, **arguments([len(row) for row in _PROBE], device))
        except (TypeError, ValueError, RuntimeError):
            return False
        apart = torch.cat([states(row) for row in _PROBE])
        mixed = states(line)
    return bool((packed - apart).norm() <= _TOLERANCE * (mixed - apart).norm())
