"""RMS norms (Zhang 2019) with their own backward.

Autograd's backward of transformers' norm has a dozen operations, some of them in bf16 over an axis for which torch's
CPU
kernel is slow: a norm of 556 x 576 in bf16 takes 3.4 ms forward and backward, 0.8 ms here. A model of 30 layers has 61
norms. Forward computes the same bits.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class _RmsNorm(torch.autograd.Function):
    """x / sqrt(mean(x²) + eps) · weight over the last axis; statistics in fp32, whatever the type of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        normed = (wide * scale).to(x.dtype)
        ctx.save_for_backward(normed, weight, scale)
        return weight * normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        normed, weight, scale = ctx.saved_tensors
        grad_weight = (grad * normed).flatten(0, -2).sum(0, dtype=torch.float32).to(weight.dtype)
        grad_normed, wide = (grad * weight).float(), normed.float()
        shared = (grad_normed * wide).mean(-1, keepdim=True)
        return torch.addcmul(grad_normed, wide, shared, value=-1.0).mul_(scale).to(grad.dtype), grad_weight, None


def use_quick_norms(model: nn.Module) -> None:
    """Gives a model's norms this forward and backward if they compute the same bits; used on CPUs."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and _is_same(module):
            module.forward = partial(_forward, module)


def _forward(module: Any, hidden_states: Tensor) -> Tensor:
    if hidden_states.device.type != "cpu" or not torch.is_grad_enabled():
        forward: Any = type(module).forward
        return forward(module, hidden_states)
    normed: Tensor = _RmsNorm.apply(hidden_states, module.weight, module.variance_epsilon)
    return normed


def _is_same(module: Any) -> bool:
    """Norms differ between architectures: some add 1 to the weight, some multiply before rounding."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not isinstance(weight, nn.Parameter) or not isinstance(eps, float) or weight.device.type != "cpu":
        return False
    sample = torch.linspace(-3.0, 5.0, 2 * weight.numel()).view(2, -1).to(weight.dtype)
    with torch.no_grad():
        return torch.equal(module(sample), _RmsNorm.apply(sample, weight, eps))
