"""Sums of rows in memory of the host, by compiled loops (actors.weights.sums.kernels): read, copied, or in panels."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache

import numpy as np
import torch

from actors.weights.canonical import EXPONENTS
from actors.weights.sums import factors, kernels
from actors.weights.sums.factors import WORD_BYTES
from actors.weights.sums.kernels import U64, Words

_THREAD_BYTES = 1 << 20  # fewer are not worth a thread


def row_sums(rows: torch.Tensor, first_byte: int) -> torch.Tensor:
    """(rows, 2), int64: per row the sums over its words, before the row's own factor.

    Args:
        rows: (rows, elements), on the host; neighbors in a row are neighbors in memory.
        first_byte: of the whole's row, at which these begin.
    """
    if not _lie_in_words(rows, first_byte):
        rows, first_byte = _moved(rows, first_byte), first_byte - first_byte % WORD_BYTES
    words, size, first = _words(rows), _num_words(rows), first_byte // WORD_BYTES
    stride = rows.stride(0) * rows.element_size() // WORD_BYTES
    table, sums = factors.of_words(factors.rounded(first + size)), _room(len(rows))

    def sum_some(begin: int, end: int) -> None:
        kernels.sum_rows(words[begin * stride :], stride, size, table, first, sums[begin:end])

    _in_threads(sum_some, len(rows), rows.nbytes)
    return _signed(sums, first, size)


def copied_sums(part: torch.Tensor, out: torch.Tensor, width: int, offset: int) -> tuple[int, int]:
    """Writes the canonical elements of a range to `out`, and returns both sums of these. Needs `can_copy`.

    Args:
        width: elements of a row of the whole.
        offset: of the first element in the whole.
    """
    words, target = _flat_words(part), _flat_words(out)
    size, first = (count * part.element_size() // WORD_BYTES for count in (width, offset))
    table, totals = factors.of_words(factors.rounded(size)), factors.totals(factors.rounded(size))
    of_rows = factors.of_rows_here(factors.rounded((first + len(words) - 1) // size + 1))
    masks = _masks(part.dtype)
    sums: list[tuple[np.uint64, np.uint64]] = []

    def copy_some(begin: int, end: int) -> None:
        some, there = words[begin:end], target[begin:end]
        sums.append(kernels.copy_range(some, there, size, first + begin, masks, table, totals, of_rows))

    _in_threads(copy_some, len(words), part.nbytes)
    return sum(int(one) for one, _ in sums), sum(int(two) for _, two in sums)


def can_copy(part: torch.Tensor, out: torch.Tensor, width: int, offset: int) -> bool:
    """Whether both lie in the words of the whole, in which `copied_sums` knows elements."""
    size = part.element_size()
    ends = part.data_ptr() | out.data_ptr() | part.nbytes | width * size | offset * size
    return part.dtype in EXPONENTS and not ends % WORD_BYTES


class Panels:
    """A matrix in panels of `height` rows, in memory that belongs to somebody else.

    Args:
        size: words of a row, a multiple of kernels.WORDS_AT_ONCE.
    """

    def __init__(self, words: Words, height: int, size: int) -> None:
        self._words, self.height, self._size = words, height, size

    def fill(self, first: int, rows: torch.Tensor) -> None:
        """Writes contiguous rows, whole panels from row `first` on."""
        source, panel = _words(rows), self.height * self._size
        target = self._words[first * self._size : first * self._size + len(source)]

        def fill_some(begin: int, end: int) -> None:
            at = slice(begin * panel, end * panel)
            kernels.fill_panels(source[at], target[at], self.height, self._size)

        _in_threads(fill_some, len(source) // panel, rows.nbytes)

    def row_sums(self) -> torch.Tensor:
        """Of all rows, as `row_sums`."""
        panel, sums = self.height * self._size, _room(len(self._words) // self._size)
        table = factors.of_words(factors.rounded(self._size))

        def sum_some(begin: int, end: int) -> None:
            words, some = self._words[begin * panel : end * panel], sums[begin * self.height : end * self.height]
            kernels.sum_panels(words, self.height, self._size, table, some)

        _in_threads(sum_some, len(self._words) // panel, self._words.nbytes)
        return _signed(sums, 0, self._size)


def _lie_in_words(rows: torch.Tensor, first_byte: int) -> bool:
    """Whether the whole's words begin at multiples of four in memory, and none is cut."""
    size = rows.element_size()
    step = rows.stride(0) * size if len(rows) > 1 else 0
    return not (rows.data_ptr() | step | rows.shape[1] * size | first_byte) % WORD_BYTES


def _moved(rows: torch.Tensor, first_byte: int) -> torch.Tensor:
    """The bytes between zeros, which add nothing, so that they lie in words."""
    read = rows.view(torch.uint8)
    before = first_byte % WORD_BYTES
    moved = read.new_zeros(len(read), -(-(before + read.shape[1]) // WORD_BYTES) * WORD_BYTES)
    moved[:, before : before + read.shape[1]] = read
    return moved


def _words(rows: torch.Tensor) -> Words:
    """The memory from the first element to the last."""
    span = (len(rows) - 1) * rows.stride(0) + rows.shape[1]
    flat = rows.detach().as_strided((span,), (1,)).view(torch.uint8).numpy()
    return flat.view(np.uint32)


def _flat_words(part: torch.Tensor) -> Words:
    return part.detach().view(torch.uint8).numpy().view(np.uint32)


def _num_words(rows: torch.Tensor) -> int:
    return int(rows.shape[1] * rows.element_size() // WORD_BYTES)


def _room(num_rows: int) -> U64:
    return np.empty((num_rows, factors.SEQUENCES), np.uint64)


@lru_cache(maxsize=len(EXPONENTS))
def _masks(dtype: torch.dtype) -> Words:
    """See kernels.copy_range."""
    bits = 8 * dtype.itemsize
    exponent, element = EXPONENTS[dtype], (1 << bits) - 1
    other = (exponent << bits, element << bits) if dtype.itemsize < WORD_BYTES else (0, 0)
    return np.array([exponent, element, *other], np.uint32)


def _signed(sums: U64, first: int, size: int) -> torch.Tensor:
    """Subtracts what kernels.SIGNS added."""
    so_far = factors.totals(factors.rounded(first + size))
    sums -= (so_far[:, first + size] - so_far[:, first]) * kernels.SIGNS
    return torch.from_numpy(sums.view(np.int64))


def _in_threads(work: Callable[[int, int], None], count: int, num_bytes: int) -> None:
    """Calls `work(begin, end)` for parts of 0 to `count`, in as many threads as torch uses here."""
    num_threads = min(torch.get_num_threads(), count, 1 + num_bytes // _THREAD_BYTES)
    if num_threads == 1:
        work(0, count)
        return
    bounds = [count * thread // num_threads for thread in range(num_threads + 1)]
    waiting = [_pool().submit(work, begin, end) for begin, end in zip(bounds[1:], bounds[2:], strict=False)]
    work(*bounds[:2])
    for part in waiting:
        part.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="words")
