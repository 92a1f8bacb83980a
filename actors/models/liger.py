"""Liger's kernels (Hsu 2024) for the norms and MLPs of one loaded model.

The package is optional. It patches transformers' modules, too: that is undone, because models that are loaded later,
such as an export that is read back on the CPU, can't use the kernels. Log-probs have a head of their own (heads.py),
so that the kernels for losses are not used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.utils import is_liger_kernel_available

from orchestrator.errors import ConfigError, DataError

_DEVICE = "cuda"
_KERNELS = {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}
_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def use_liger(pretrained: Any, forward: Callable[[], Tensor]) -> None:
    """Gives a model the kernels.

    Args:
        forward: the model's output on a few tokens.

    Raises:
        ConfigError: the package is missing, there is no GPU, or it has no kernels for the model.
        DataError: the model computes otherwise with them.
    """
    if not is_liger_kernel_available():
        raise ConfigError(
            "liger=true needs package liger-kernel, which requirements/gpu.txt has: pip install "
            "'rlhf-orchestrator[liger]', or set liger=false."
        )
    if pretrained.device.type != _DEVICE:
        raise ConfigError(f"liger=true needs a GPU, and the model is on {pretrained.device}. Set liger=false.")
    from transformers.integrations import liger  # noqa: PLC0415 (imports peft and bitsandbytes: two seconds)

    module = sys.modules[type(pretrained).__module__]
    own = dict(vars(module))
    with torch.no_grad():
        expected = forward()
        liger.apply_liger_kernel(pretrained, _KERNELS)
        for name, value in own.items():
            setattr(module, name, value)
        if not any(_is_liger(layer) for layer in pretrained.modules()):
            raise ConfigError(
                f"Liger has no kernels for {type(pretrained).__name__} ({pretrained.name_or_path}). Set liger=false."
            )
        difference = (forward() - expected).abs().max().item()
    if not difference <= _TOLERANCES.get(pretrained.dtype, 0.05) * max(1.0, expected.abs().max().item()):
        raise DataError(
            f"{pretrained.name_or_path} computes otherwise with Liger's kernels, by {difference:.3g}. Set liger=false."
        )


def _is_liger(layer: Any) -> bool:
    forward = vars(layer).get("forward")
    return getattr(forward, "__module__", "").startswith("liger_kernel")
