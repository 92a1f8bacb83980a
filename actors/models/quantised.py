"""Frozen weights in 4 or 8 bits (QLoRA, Dettmers 2023), by bitsandbytes: products are those of the dequantised weights.

A weight is cut into blocks; each has a scale in fp32. 4 bits are the quantiles of a normal distribution (NF4), 8 bits
those of Dettmers 2022 (arXiv 2110.02861). Only one layer's weights are dequantised at a time, in the backward too.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.errors import ConfigError
from orchestrator.planning.memory import QUANTISED_BLOCKS


@cache
def _bitsandbytes() -> Any:
    """Not imported above: it is optional and takes seconds."""
    try:
        return importlib.import_module("bitsandbytes.functional")
    except Exception as error:  # noqa: BLE001  it loads native libraries, which fail in many ways
        raise ConfigError(
            f"lora.trunk_bits needs the package bitsandbytes on every node, and importing it fails ({error!r}): pip "
            "install 'rlhf-orchestrator[quantised]', or leave lora.trunk_bits out."
        ) from None


class FrozenWeight(nn.Module):
    """A matrix in 4 or 8 bits. Its buffers are bytes, which a change of a model's dtype does not touch.

    Raises:
        ConfigError: bitsandbytes is missing, or can't compute on the weight's device.
    """

    packed: Tensor
    scales: Tensor
    code: Tensor

    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__()
        self.bits, self.shape, self.dtype = bits, weight.shape, weight.dtype
        library = _bitsandbytes()
        try:
            if bits == 4:
                packed, state = library.quantize_4bit(weight, blocksize=QUANTISED_BLOCKS[bits], quant_type="nf4")
            else:
                packed, state = library.quantize_blockwise(weight, blocksize=QUANTISED_BLOCKS[bits])
        except (RuntimeError, NotImplementedError, ValueError) as error:
            raise ConfigError(
                f"lora.trunk_bits={bits}: bitsandbytes can't quantise {weight.dtype} on {weight.device} ({error}). "
                "Install a version for this device, or leave lora.trunk_bits out."
            ) from error
        for name, tensor in {"packed": packed, "scales": state.absmax, "code": state.code}.items():
            as_bytes = tensor.detach().contiguous().view(torch.uint8)
            self.register_buffer(name, as_bytes, persistent=False)

    def tensor(self) -> Tensor:
        """The weight in its own type: a new tensor."""
        library = _bitsandbytes()
        state = library.QuantState(
            absmax=self.scales.view(torch.float32),
            shape=self.shape,
            code=self.code.view(torch.float32),
            blocksize=QUANTISED_BLOCKS[self.bits],
            quant_type="nf4" if self.bits == 4 else None,
            dtype=self.dtype,
        )
        dequantise = library.dequantize_4bit if self.bits == 4 else library.dequantize_blockwise
        found: Tensor = dequantise(self.packed, state)
        return found.view(self.shape)

    def spec(self) -> Tensor:
        """A tensor without values of the weight's shape and type."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


class _Product(torch.autograd.Function):
    """Inputs times the transposed weight, or times the weight itself, which the backward dequantises again."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, frozen: FrozenWeight, bias: Tensor | None, transposed: bool) -> Tensor:
        ctx.frozen, ctx.transposed = frozen, transposed
        weight = frozen.tensor()
        return nn.functional.linear(inputs, weight.T if transposed else weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        weight = ctx.frozen.tensor()
        (grad,) = grads
        return grad @ (weight.T if ctx.transposed else weight), None, None, None


def product(inputs: Tensor, frozen: FrozenWeight, bias: Tensor | None, *, transposed: bool) -> Tensor:
    """The output of a linear layer. Neither weight nor bias learns.

    Args:
        transposed: the weight is (inputs, outputs).
    """
    output: Tensor = _Product.apply(inputs, frozen, bias, transposed)
    return output
