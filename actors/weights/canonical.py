"""The form in which weights are sent: -0 and subnormals become +0.

Matrix units flush them, so a receiver that reads weights back through its layers could not distinguish them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

# Bits of the exponent, by dtype: all zero in 0 and in subnormals.
EXPONENTS: Mapping[torch.dtype, int] = {
    torch.float32: 0x7F800000,
    torch.bfloat16: 0x7F80,
    torch.float16: 0x7C00,
}


def canonical(tensor: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Replaces -0 and subnormals by +0; NaN stays."""
    if not tensor.is_floating_point():
        return tensor.clone() if out is None else out.copy_(tensor)
    info = torch.finfo(tensor.dtype)
    shrunk: torch.Tensor = torch.hardshrink(tensor, info.tiny * (1 - info.eps), out=out)
    return shrunk


def flushed(tensor: torch.Tensor) -> torch.Tensor:
    """Removes subnormals that a cast to float16 produces; other dtypes have the exponents of the sent ones."""
    return canonical(tensor) if tensor.dtype == torch.float16 else tensor
