"""A linear digest of tensors: digests of parts add up to the digest of the whole, wherever the parts are.

A tensor of row width W is read as a matrix of bytes x[r, c], row-major. For j = 1, 2:

    digest_j = N_j · Σ_r A_j(r) Σ_c h_j(c) x[r, c]   mod 2^64,   h_j(c) = Σ_m g_j(m) b_j(c, m), m = 0..7

b holds pseudo-random odd numbers from -63 to 63. A, g and N are pseudo-random 64-bit numbers; A, N and
g_j(0) are odd, the other g even, so every weight N A(r) h(c) is odd. N depends on the tensor's name, dtype and shape. A
digest also counts bytes.

The word is the byte, which no shard can cut: shards of tensor parallel (rows or columns), flat ranges of ZeRO and
strided views are sums over their bytes, with the weights of the bytes' positions in the whole. The weights are a
product of one factor per row and one per column, so the inner sums are a product of int8 matrices, `torch._int_mm`,
which reads the data once, at about the speed of a copy where a CPU or GPU has int8 dot products. It is exact
everywhere: sums stay below 2^31, and |b| < 64 keeps the 16-bit steps of CPUs without VNNI from saturating.

What is found:

- Every change of a single bit or byte: odd weights have inverses mod 2^64.
- A missing or doubled part, a truncation: bytes are counted.
- Any other fixed change, such as an element of several bytes, swapped elements or rows, a stale matrix: it is missed
  only if both digests miss it. In a row that changed, the eight sums of a digest all vanish with a probability of at
  most 64^-8 = 2^-48. Otherwise they have a common factor 2^t, usually 2^0 and at most 2^24, and the random g and A
  cancel the change with a probability of about 2^(t - 62). Both together: about 2^-96.
- Swapped tensors: N differs.

Weights are constants of this module, equal on all devices and hosts (of little-endian bytes). They detect faults, not
forgery.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import accumulate
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_SEQUENCES = 2
_SUMS = 8  # per sequence
_COLUMNS = _SEQUENCES * _SUMS
_MASK = (1 << 64) - 1
_MIN_ROW = 64  # elements; shorter rows are joined
_MAX_ROW_BYTES = 1 << 17  # 2^17 · 128 · 63 < 2^31
_ROWS_AT_ONCE = 1 << 15
_CUDA_MIN_ROWS, _CUDA_MULTIPLE, _CUDA_ALIGNMENT = 32, 8, 16  # what cuBLAS needs for int8

Sums = torch.Tensor  # (2,), int64: the two sums of a part, before N, on the part's device


@dataclass(frozen=True)
class Digest:
    """The digest of a tensor, or of a part of it; `+` joins disjoint parts of the same tensor."""

    num_bytes: int
    first: int
    second: int

    def __add__(self, other: Digest) -> Digest:
        return Digest(
            self.num_bytes + other.num_bytes,
            (self.first + other.first) & _MASK,
            (self.second + other.second) & _MASK,
        )

    @property
    def hex(self) -> str:
        return f"{self.num_bytes:x}-{self.first:016x}{self.second:016x}"


def digest(tensor: torch.Tensor, name: str) -> Digest:
    """The digest of a whole tensor. Waits for its device; `Digests` does not."""
    return digest_part(tensor, name, tensor.shape)


def digest_part(
    part: torch.Tensor, name: str, whole: Sequence[int], offset: int = 0, strides: Sequence[int] | None = None
) -> Digest:
    """The digest of a part of the tensor `name` of shape `whole`.

    Args:
        part: of the whole's dtype, with any strides in memory.
        offset: position of the part's first element in the whole, counted in row-major order.
        strides: distances in the whole, in elements, of neighbors along each dimension of `part`. None: a box of the
            whole (a part with as many dimensions) or a range of its elements (a part with one).

    Raises:
        ValueError: the part does not fit into the whole.
    """
    return named(part_sums(part, whole, offset, strides).tolist(), part, name, whole)


def named(sums: Sequence[int], part: torch.Tensor, name: str, whole: Sequence[int]) -> Digest:
    """The digest of a part with the given sums. Of `part` only dtype and size matter."""
    multipliers = _multipliers(name, str(part.dtype), tuple(whole))
    first, second = ((total * multiplier) & _MASK for total, multiplier in zip(sums, multipliers, strict=True))
    return Digest(part.numel() * part.element_size(), first, second)


class Digests:
    """Digests of many parts of tensors, without waiting for their device until `result`."""

    def __init__(self) -> None:
        self._parts: list[tuple[str, tuple[int, ...], torch.Tensor, Sums]] = []

    def add(
        self,
        name: str,
        part: torch.Tensor,
        whole: Sequence[int] | None = None,
        offset: int = 0,
        strides: Sequence[int] | None = None,
    ) -> None:
        """See `digest_part`; `whole` None: `part` is the whole tensor."""
        whole = tuple(part.shape if whole is None else whole)
        self._parts.append(
            (name, whole, part.new_empty(part.shape, device="meta"), part_sums(part, whole, offset, strides))
        )

    def result(self) -> dict[str, Digest]:
        """By name: the sum over the parts added under it."""
        totals: dict[str, Digest] = {}
        if self._parts:
            sums = torch.stack([sums for *_, sums in self._parts]).tolist()
            for (name, whole, part, _), pair in zip(self._parts, sums, strict=True):
                totals[name] = totals.get(name, Digest(0, 0, 0)) + named(pair, part, name, whole)
        return totals


@torch.no_grad()
def part_sums(part: torch.Tensor, whole: Sequence[int], offset: int = 0, strides: Sequence[int] | None = None) -> Sums:
    """The sums of `digest_part`, on the part's device, without waiting for it."""
    part = part.detach()
    steps = _strides_in(whole, part) if strides is None else tuple(strides)
    if len(steps) != part.dim() or offset < 0 or min(steps, default=0) < 0:
        raise ValueError(f"offset {offset} and strides {steps} do not describe a part of shape {tuple(part.shape)}.")
    total = torch.zeros(_SEQUENCES, dtype=torch.int64, device=part.device)
    if not part.numel():
        return total
    last = offset + sum((size - 1) * step for size, step in zip(part.shape, steps, strict=True))
    if last >= prod(whole):
        raise ValueError(
            f"a part of shape {tuple(part.shape)} with strides {steps} at {offset} exceeds a tensor of shape "
            f"{tuple(whole)}."
        )
    for box in _boxes(part, _row_width(whole), offset, steps):
        total += box.sums()
    return total


@dataclass(frozen=True, eq=False)
class _Box:
    """Rows first_row, first_row + row_step, ... of the whole; of each, elements from `first_column` on."""

    elements: torch.Tensor  # (rows, elements)
    first_row: int
    row_step: int
    first_column: int

    def sums(self) -> Sums:
        device, num_rows = self.elements.device, len(self.elements)
        end_row = self.first_row + (num_rows - 1) * self.row_step + 1
        rows = _row_weights(_rounded(end_row), device)[self.first_row : end_row : self.row_step]
        size = self.elements.element_size()
        first, end = self.first_column * size, (self.first_column + self.elements.shape[1]) * size
        columns = _column_weights(_rounded(end + _CUDA_MULTIPLE), device)[first:]
        sums = torch.zeros(_SEQUENCES, _SUMS, dtype=torch.int64, device=device)
        for start in range(0, num_rows, _ROWS_AT_ONCE):
            block = self.elements[start : start + _ROWS_AT_ONCE]
            block = (block if block.stride(1) == 1 else block.contiguous()).view(torch.int8)
            for left in range(0, end - first, _MAX_ROW_BYTES):
                inner = _product(block[:, left : left + _MAX_ROW_BYTES], columns[left:])
                weights = rows[start : start + _ROWS_AT_ONCE, :, None]
                sums += (inner.view(-1, _SEQUENCES, _SUMS) * weights).sum(0)
        return (sums * _sum_weights(device)).sum(1)


def _boxes(part: torch.Tensor, width: int, offset: int, steps: Sequence[int]) -> Iterator[_Box]:
    """Cuts a part into boxes of a matrix of row width `width`."""
    order = sorted((dim for dim in range(part.dim()) if part.shape[dim] > 1), key=lambda dim: -steps[dim])
    part = part.squeeze().permute([sum(part.shape[d] > 1 for d in range(dim)) for dim in order])
    shape, strides = _merged(part.shape, [steps[dim] for dim in order])
    part = part.reshape(shape)
    *outer, (size, step) = zip(shape, strides, strict=True)
    start = offset % width
    if step != 1:
        yield from _scattered(part, width, offset, strides)
    elif not outer:
        yield from _range(part, width, offset)
    elif len(outer) == 1 and start + size <= width and outer[0][1] % width == 0:
        yield _Box(part, offset // width, outer[0][1] // width, start)
    else:
        for number, inner in enumerate(part):
            yield from _boxes(inner, width, offset + number * strides[0], strides[1:])


def _range(part: torch.Tensor, width: int, offset: int) -> Iterator[_Box]:
    """Boxes of a range of elements: the end of a row, whole rows, the start of a row."""
    row, column = divmod(offset, width)
    if column or len(part) < width:
        head, part = part[: width - column], part[width - column :]
        yield _Box(head[None], row, 1, column)
        row += 1
    whole = len(part) // width
    if whole:
        yield _Box(part[: whole * width].view(whole, width), row, 1, 0)
    if len(part) % width:
        yield _Box(part[None, whole * width :], row + whole, 1, 0)


def _scattered(part: torch.Tensor, width: int, offset: int, strides: Sequence[int]) -> Iterator[_Box]:
    """Boxes of a part without neighboring elements: the range that it spans, with zeros, which add nothing."""
    if 0 in strides:  # elements that are used several times
        dim = list(strides).index(0)
        rest = [stride for number, stride in enumerate(strides) if number != dim]
        for once in part.unbind(dim):
            yield from _boxes(once, width, offset, rest)
        return
    span = 1 + sum((size - 1) * stride for size, stride in zip(part.shape, strides, strict=True))
    spread = part.new_zeros(span)
    spread.as_strided(part.shape, tuple(strides)).copy_(part)
    yield from _range(spread, width, offset)


def _product(block: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(rows, 16), int32: the product of int8 bytes with the first rows of `weights`."""
    num_rows, width = block.shape
    if not block.is_cuda:
        return torch._int_mm(block, weights[:width])
    padded_width = -(-width // _CUDA_MULTIPLE) * _CUDA_MULTIPLE
    if num_rows < _CUDA_MIN_ROWS or width != padded_width:
        padded = block.new_zeros(max(num_rows, _CUDA_MIN_ROWS), padded_width)
        padded[:num_rows, :width] = block
        block = padded
    elif not block.is_contiguous() or block.data_ptr() % _CUDA_ALIGNMENT:
        block = block.clone(memory_format=torch.contiguous_format)
    return torch._int_mm(block, weights[:padded_width].contiguous())[:num_rows]


def _row_width(whole: Sequence[int]) -> int:
    """Elements of a row: the last dimension, joined with those before it if it is short."""
    widths = list(accumulate(reversed(whole), lambda product, size: product * size))
    return next((width for width in widths if width >= _MIN_ROW), widths[-1] if widths else 1)


def _strides_in(whole: Sequence[int], part: torch.Tensor) -> tuple[int, ...]:
    if part.dim() == len(whole):
        if any(size > limit for size, limit in zip(part.shape, whole, strict=True)):
            raise ValueError(f"a part of shape {tuple(part.shape)} exceeds a tensor of shape {tuple(whole)}.")
        return tuple(prod(whole[dim + 1 :]) for dim in range(len(whole)))
    if part.dim() == 1:
        return (1,)
    raise ValueError(f"strides are needed for a part of shape {tuple(part.shape)} of a tensor of shape {tuple(whole)}.")


def _merged(shape: Sequence[int], strides: Sequence[int]) -> tuple[list[int], list[int]]:
    """Joins dimensions that are neighbors in the whole; at least one dimension."""
    sizes, steps = [1], [1]
    for size, step in zip(reversed(shape), reversed(strides), strict=True):
        if sizes[0] == 1:
            sizes[0], steps[0] = size, step
        elif step == sizes[0] * steps[0]:
            sizes[0] *= size
        else:
            sizes.insert(0, size)
            steps.insert(0, step)
    return sizes, steps


def _rounded(size: int) -> int:
    """Few distinct sizes of tables."""
    return 1 << max(12, (size - 1).bit_length())


_Words = npt.NDArray[np.uint64]


def _mixed(numbers: _Words, stream: int) -> _Words:
    """Pseudo-random 64-bit numbers: splitmix64 (Steele, Lea, Flood 2014) with one state per number."""
    z = (numbers + np.uint64(stream << 40)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _counted(rows: int, columns: int, stream: int) -> _Words:
    return _mixed(np.arange(1, rows * columns + 1, dtype=np.uint64), stream).reshape(rows, columns)


@lru_cache(maxsize=64)
def _row_weights(count: int, device: torch.device) -> torch.Tensor:
    """A: (count, 2), int64."""
    return _tensor(_counted(count, _SEQUENCES, 1) | np.uint64(1), device)


@lru_cache(maxsize=64)
def _column_weights(count: int, device: torch.device) -> torch.Tensor:
    """b: (count, 16), int8."""
    drawn = _counted(count, _COLUMNS // 8, 2).view(np.uint8) & np.uint8(63)
    return _tensor(drawn.astype(np.int8) * 2 - 63, device)


@lru_cache(maxsize=8)
def _sum_weights(device: torch.device) -> torch.Tensor:
    """g: (2, 8), int64."""
    drawn = _counted(_SEQUENCES, _SUMS, 3) & ~np.uint64(1)
    drawn[:, 0] |= np.uint64(1)
    return _tensor(drawn, device)


def _tensor(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    signed = array.view(np.int64) if array.dtype == np.uint64 else array.astype(np.int8)
    return torch.from_numpy(signed).to(device)


@lru_cache(maxsize=1 << 16)
def _multipliers(name: str, dtype: str, whole: tuple[int, ...]) -> tuple[int, int]:
    """N_1 and N_2."""
    drawn = blake2b(f"{name}\0{dtype}\0{whole}".encode(), digest_size=16).digest()
    return int.from_bytes(drawn[:8], "little") | 1, int.from_bytes(drawn[8:], "little") | 1
