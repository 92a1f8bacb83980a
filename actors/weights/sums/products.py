"""Sums of rows by products of int8 matrices, which GPUs compute as fast as they read memory.

cuBLAS promises these products for one layout alone: the first matrix in rows, the second in columns, both sizes of
multiples of 8 and addresses of 16 bytes. Every device gets it.
"""

from __future__ import annotations

import torch

from actors.weights.sums import factors

_MAX_ROW_BYTES = 1 << 17  # 2^17 · 128 · 64 < 2^31
_ROWS_AT_ONCE = 1 << 15
_MIN_ROWS, _MULTIPLE, _ALIGNMENT = 32, 8, 16  # torch asks for more than 16 rows


def row_sums(rows: torch.Tensor, first_byte: int) -> torch.Tensor:
    """(rows, 2), int64, on the device of `rows`: see words.row_sums."""
    size = rows.element_size()
    end = first_byte + rows.shape[1] * size
    columns = factors.of_bytes(factors.rounded(end + _MULTIPLE), rows.device)[:, first_byte:]
    blocks = [_sums(block, columns, end - first_byte) for block in rows.split(_ROWS_AT_ONCE)]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def _sums(rows: torch.Tensor, columns: torch.Tensor, num_bytes: int) -> torch.Tensor:
    read = rows.view(torch.int8)
    shape = (-1, factors.WORD_BYTES, factors.SEQUENCES, factors.DIGITS)
    sums = torch.zeros(len(rows), factors.SEQUENCES, dtype=torch.int64, device=rows.device)
    for left in range(0, num_bytes, _MAX_ROW_BYTES):
        inner = _product(read[:, left : left + _MAX_ROW_BYTES], columns[:, left:])
        sums += (inner.view(shape) * factors.of_digits(rows.device)).sum((1, 3))
    return sums


def _product(block: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(rows, 40), int32: the product of int8 bytes with the transpose of the first columns of `weights`."""
    num_rows, width = block.shape
    padded_width = -(-width // _MULTIPLE) * _MULTIPLE
    if num_rows < _MIN_ROWS or width != padded_width:
        padded = block.new_zeros(max(num_rows, _MIN_ROWS), padded_width)
        padded[:num_rows, :width] = block
        block = padded
    return torch._int_mm(_aligned(block), _aligned(weights[:, :padded_width]).t())[:num_rows]


def _aligned(matrix: torch.Tensor) -> torch.Tensor:
    if matrix.is_contiguous() and not matrix.data_ptr() % _ALIGNMENT:
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)
