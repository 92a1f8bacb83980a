"""Packed weights of linear layers on CPUs that can be read: oneDNN through torch instead of through vLLM's binding.

vLLM packs the weights of linear layers with oneDNN and keeps them in an object of C++ that can't be read. torch packs
with the same library into a tensor that it can also unpack. `install` makes vLLM's two functions use torch's: products
in fp32 are equal to the bit, and so are most in bf16. A publish then proves a layer by the memory that its kernel
reads, and needs no product.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from vllm import _custom_ops as vllm_ops

_create, _multiply = vllm_ops.create_onednn_mm, vllm_ops.onednn_mm
_pack_weight = torch.ops.mkldnn._reorder_linear_weight.default
_linear = torch.ops.mkldnn._linear_pointwise.default


class PackedWeight:
    """One weight of shape (outputs, inputs), packed.

    Args:
        transposed: the weight as vLLM's `create_onednn_mm` gets it, (inputs, outputs).
    """

    def __init__(self, transposed: torch.Tensor) -> None:
        self.shape = torch.Size(reversed(transposed.shape))
        self.dtype = transposed.dtype
        self._packed: torch.Tensor = _pack_weight(transposed.t().detach(), None)

    def multiply(self, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`torch.nn.functional.linear` with this weight."""
        flat = rows if rows.dim() == 2 else rows.reshape(-1, self.shape[1])
        product: torch.Tensor = _linear(flat, self._packed, bias, "none", [], "")
        return product if rows.dim() == 2 else product.reshape(*rows.shape[:-1], self.shape[0])

    def read(self) -> torch.Tensor:
        """The weight, unpacked, to the bit."""
        return self._packed.to_dense(self.dtype)


def packed_weight(layer: Any) -> PackedWeight | None:
    """The weight that a layer of vLLM multiplies with. None: it has another kernel."""
    cells = getattr(getattr(layer, "cpu_linear", None), "__closure__", None) or ()
    found = [cell.cell_contents for cell in cells if isinstance(cell.cell_contents, PackedWeight)]
    return found[0] if len(found) == 1 else None


def install() -> None:
    """Affects layers that vLLM packs from now on."""
    vllm_ops.create_onednn_mm = _pack
    vllm_ops.onednn_mm = _product


def _pack(weight: torch.Tensor, primitive_cache_size: int = 128) -> Any:
    return PackedWeight(weight) if _is_packed_by_torch(weight.dtype) else _create(weight, primitive_cache_size)


@cache
def _is_packed_by_torch(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _product(handler: Any, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if isinstance(handler, PackedWeight):
        return handler.multiply(rows, bias)
    return _multiply(handler, rows, bias)
