"""A linear digest of tensors: digests of parts add up to the digest of the whole, wherever the parts are.

A tensor of row width W is read as a matrix of bytes, row-major, and each row in words of four:
x[r, q] = Σ_k 2^8k byte[r, 4q + k], of signed bytes. For j = 1, 2:

    digest_j = N_j · Σ_r A_j(r) Σ_q h_j(q) x[r, q]   mod 2^64

A, h and N are pseudo-random odd numbers: A and N of 64 bits, h of 32. N depends on the tensor's name, dtype and shape.
A digest also counts bytes.

It is a sum over bytes, which no shard can cut: shards of tensor parallel (rows or columns), flat ranges of ZeRO and
strided views are sums over their bytes, with the factors of the bytes' positions in the whole. On the host, compiled
loops multiply words by h: one pass, at the speed of memory (actors.weights.sums.words). On GPUs, and where numba is not
installed, the inner sums are a product of int8 matrices: bytes times the digits of h, `torch._int_mm`
(actors.weights.sums.products). Both are exact, and so equal.

What is found:

- Every change within one word, such as a bit, a byte or an element of up to 4 bytes: its product with h is below 2^64
  and not 0, and odd numbers have inverses mod 2^64.
- A missing or doubled part, a truncation: bytes are counted.
- Any other fixed change, such as swapped elements or rows, a stale matrix: it is missed only if both digests miss it.
  The inner sum of a row that changed does so with a probability of at most 2^-31: only one value of the last h cancels
  the others. Otherwise A cancels the rows' changes with a probability of about 2^(t - 62), where 2^t divides them all,
  usually 2^0. Both digests together: about 2^-62.
- Swapped tensors: N differs.

The factors are constants (actors.weights.sums.factors), equal on all devices and hosts (of little-endian bytes). They
detect faults, not forgery.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from math import prod
from types import ModuleType

import torch

from actors.weights.canonical import canonical
from actors.weights.sums import factors, products

_MASK = (1 << 64) - 1
_MIN_ROW = 64  # elements; shorter rows are joined

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
    return _named(sums, part.numel() * part.element_size(), name, part.dtype, whole)


def digest_of_rows(sums: torch.Tensor, first: int, name: str, dtype: torch.dtype, whole: Sequence[int]) -> Digest:
    """The digest of rows of a tensor, which `first` begins, from the sums (rows, 2) of each (words.row_sums)."""
    weights = factors.of_rows(factors.rounded(first + len(sums)), sums.device)[first : first + len(sums)]
    total = (sums * weights).sum(0).tolist()
    return _named(total, len(sums) * row_width(whole) * dtype.itemsize, name, dtype, whole)


def copied_part(part: torch.Tensor, out: torch.Tensor, name: str, whole: Sequence[int], offset: int) -> Digest:
    """Writes a range of a tensor's elements to `out`, in the canonical form; returns the digest of what was written.

    Args:
        part: contiguous elements from `offset` on, counted in row-major order; at least one.
        out: as many, on the same device.
    """
    width = row_width(whole)
    words = _words() if part.device.type == "cpu" else None
    if words is not None and words.can_copy(part, out, width, offset):
        return named(words.copied_sums(part, out, width, offset), part, name, whole)
    canonical(part, out=out)
    return digest_part(out, name, whole, offset, (1,))


def _named(sums: Sequence[int], num_bytes: int, name: str, dtype: torch.dtype, whole: Sequence[int]) -> Digest:
    multipliers = factors.of_tensor(name, str(dtype), tuple(whole))
    first, second = ((total * multiplier) & _MASK for total, multiplier in zip(sums, multipliers, strict=True))
    return Digest(num_bytes, first, second)


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
    total = torch.zeros(factors.SEQUENCES, dtype=torch.int64, device=part.device)
    if not part.numel():
        return total
    last = offset + sum((size - 1) * step for size, step in zip(part.shape, steps, strict=True))
    if last >= prod(whole):
        raise ValueError(
            f"a part of shape {tuple(part.shape)} with strides {steps} at {offset} exceeds a tensor of shape "
            f"{tuple(whole)}."
        )
    for box in _boxes(part, row_width(whole), offset, steps):
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
        return self._weighted(_row_sums(self.elements, self._first_byte))

    @property
    def _first_byte(self) -> int:
        return self.first_column * self.elements.element_size()

    def _weighted(self, row_sums: torch.Tensor) -> Sums:
        end_row = self.first_row + (len(row_sums) - 1) * self.row_step + 1
        rows = factors.of_rows(factors.rounded(end_row), row_sums.device)[self.first_row : end_row : self.row_step]
        return (row_sums * rows).sum(0)


def _row_sums(rows: torch.Tensor, first_byte: int) -> torch.Tensor:
    """(rows, 2), int64."""
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    words = _words() if rows.device.type == "cpu" else None
    found: torch.Tensor = (products if words is None else words).row_sums(rows, first_byte)
    return found


@cache
def _words() -> ModuleType | None:
    """None: numba is not installed. It takes half a second to import, so only processes that need it do."""
    try:
        from actors.weights.sums import words  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if error.name != "numba":
            raise
        return None
    return words


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


def row_width(whole: Sequence[int]) -> int:
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
