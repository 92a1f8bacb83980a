"""Mixture-of-experts weights, which vLLM's CPU engines keep packed: reads them, and repacks them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

_WEIGHTS = ("w13_weight", "w2_weight")
_DIGIT_BITS = 13
_DIGIT_MARK = 1 << _DIGIT_BITS  # as bits of a bfloat16 these are normal numbers, distinct from the zeros of padding


@dataclass(frozen=True)
class ExpertLayout:
    """The packed position of each element of one expert."""

    shapes: Mapping[str, torch.Size]
    positions: Mapping[str, torch.Tensor]

    @staticmethod
    def is_packed(layer: Any, name: str) -> bool:
        return name in _WEIGHTS and _are_packed(layer)

    @staticmethod
    def of(layer: Any) -> ExpertLayout:
        """Packs numbers instead of weights, a few bits at a time, and finds their positions.

        Raises:
            ValueError: the packing loses elements.
        """
        shapes = {name: get_layerwise_info(layer).restore_metadata[0][name].shape for name in _WEIGHTS}
        sizes = {name: prod(shape[1:]) for name, shape in shapes.items()}
        numbers = dict.fromkeys(_WEIGHTS, torch.zeros((), dtype=torch.int64))
        digits = 0
        found: dict[str, torch.Tensor] = {}
        while digits == 0 or max(sizes.values()) > 1 << digits:
            packed = _packed_digits(layer, shapes, digits)
            for name in _WEIGHTS:
                numbers[name] = numbers[name] + ((packed[name] & (_DIGIT_MARK - 1)) << digits)
                found[name] = packed[name] >= _DIGIT_MARK
            digits += _DIGIT_BITS
        positions = {}
        for name in _WEIGHTS:
            (where,) = found[name].nonzero(as_tuple=True)
            order = numbers[name][where].argsort()
            positions[name] = where[order]
            if len(where) != sizes[name]:
                raise ValueError(f"packing {name} keeps {len(where)} of {sizes[name]} elements")
        return ExpertLayout(shapes, positions)

    def unpack(self, name: str, packed: torch.Tensor) -> torch.Tensor:
        """The experts as they were loaded."""
        rows = packed.detach().reshape(len(packed), -1)
        return rows[:, self.positions[name]].reshape(self.shapes[name])


def _are_packed(layer: Any) -> bool:
    kind = getattr(getattr(layer, "quant_method", None), "experts_cls", None)
    return isinstance(kind, type) and issubclass(kind, CPUUnquantizedExperts)


def _packed_digits(layer: Any, shapes: Mapping[str, torch.Size], shift: int) -> dict[str, torch.Tensor]:
    """Bits [shift, shift + 13) of every element's number, packed as the layer packs the weights of one expert."""
    dtype = layer.w13_weight.dtype
    stand_in = nn.Module()
    for name, shape in shapes.items():
        digits = (torch.arange(prod(shape[1:])) >> shift) % _DIGIT_MARK + _DIGIT_MARK
        values = digits.to(torch.int16).view(torch.bfloat16).reshape(1, *shape[1:]).to(dtype)
        stand_in.register_parameter(name, nn.Parameter(values, requires_grad=False))
    layer.quant_method.moe_kernel.fused_experts.process_weights_after_loading(stand_in)
    return {
        name: getattr(stand_in, name).detach().to(torch.bfloat16).reshape(-1).view(torch.int16).long()
        for name in shapes
    }


def pack_again(model: nn.Module) -> None:
    """Makes vLLM pack experts again on the next load.

    vLLM 0.32 packs them when it creates their kernel, and keeps the kernel when weights are loaded again. Remove this
    when UnquantizedFusedMoEMethod packs on every load.
    """
    for layer in model.modules():
        method: Any = getattr(layer, "quant_method", None)
        if _are_packed(layer):
            method.moe_kernel = None
