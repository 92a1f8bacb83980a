"""Packed weights of linear layers on CPUs that can be read: oneDNN through torch instead of through vLLM's binding.

vLLM packs the weights of linear layers with oneDNN and keeps them in an object of C++ that can't be read. torch packs
with the same library into a tensor that it can also unpack. `install` makes vLLM's two functions use torch's: products
in fp32 are equal to the bit, and so are most in bf16. A publish then proves a layer by the memory that its kernel
reads, and needs no product.

oneDNN mostly packs into panels (actors.weights.sums.kernels). Where it does, rows are written to that memory and summed
there, without packing and unpacking.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
import torch
from vllm import _custom_ops as vllm_ops

from actors.weights.sums.factors import WORD_BYTES
from actors.weights.sums.kernels import WORDS_AT_ONCE, Words
from actors.weights.sums.words import Panels

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
        self._panels: Panels | None = None

    def multiply(self, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`torch.nn.functional.linear` with this weight."""
        flat = rows if rows.dim() == 2 else rows.reshape(-1, self.shape[1])
        product: torch.Tensor = _linear(flat, self._packed, bias, "none", [], "")
        return product if rows.dim() == 2 else product.reshape(*rows.shape[:-1], self.shape[0])

    def read(self) -> torch.Tensor:
        """The weight, unpacked, to the bit."""
        return self._packed.to_dense(self.dtype)

    @property
    def height(self) -> int | None:
        """Rows of a panel. None: it is packed otherwise."""
        return panel_height(self.shape, self.dtype)

    def write(self, first: int, rows: torch.Tensor) -> None:
        """Replaces rows from `first` on; both ends are ends of panels."""
        self._in_panels().fill(first, rows.to(self.dtype).contiguous())

    def row_sums(self) -> torch.Tensor:
        """(outputs, 2): see words.row_sums. Needs panels."""
        return self._in_panels().row_sums()

    def _in_panels(self) -> Panels:
        if self._panels is None:
            height = self.height
            assert height is not None, "not packed in panels"
            self._panels = Panels(_memory(self._packed), height, self.shape[1] * self.dtype.itemsize // WORD_BYTES)
        return self._panels


@cache
def panel_height(shape: torch.Size, dtype: torch.dtype) -> int | None:
    """The height of the panels into which a weight of this shape is packed, found by packing numbers. None: it is
    packed otherwise."""
    num_words, rest = divmod(shape.numel() * dtype.itemsize, WORD_BYTES)
    size = num_words // shape[0]
    if rest or num_words > torch.iinfo(torch.int32).max or size % WORDS_AT_ONCE or size * shape[0] != num_words:
        return None
    numbers = torch.arange(num_words, dtype=torch.int32)
    packed = _pack_weight(numbers.view(dtype).view(shape), None)
    memory = _memory(packed)
    firsts = np.arange(0, num_words, size)
    is_column = memory[: len(firsts)] == firsts
    height = len(firsts) if is_column.all() else int(is_column.argmin())
    if len(memory) != num_words or not height or shape[0] % height:
        return None
    panels = numbers.view(-1, height, size).transpose(1, 2).numpy()
    return height if np.array_equal(memory.reshape(panels.shape), panels) else None


def _memory(packed: torch.Tensor) -> Words:
    """Words in the memory of a packed tensor, which must outlive them."""
    num_bytes, address = torch.ops.mkldnn._nbytes(packed), torch.ops.mkldnn.data_ptr(packed)
    return np.ctypeslib.as_array((ctypes.c_uint32 * (num_bytes // WORD_BYTES)).from_address(address))


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
