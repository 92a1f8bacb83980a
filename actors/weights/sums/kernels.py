"""Compiled loops over the words of weights on CPUs. Each reads memory once, where torch would take several passes.

Words are unsigned integers of 4 bytes. A matrix in panels has word i of row r at position
(r // height * size + i) * height + r % height: `height` rows, transposed.

`factors` are of words: (2, columns), uint64 below 2^32. The bytes of a word count signed; `SIGNS` makes them unsigned:
(word ^ SIGNS) - SIGNS is the sum of its signed bytes times 2^8k. The loops leave the subtraction to their callers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

Words = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]

SIGNS = np.uint64(0x80808080)
WORDS_AT_ONCE = 4  # of each row in `sum_panels`
_LINE = 16  # words of a cache line
# Says that factors are below 2^32: then CPUs multiply them four or eight at a time.
_LOW = np.uint64(0xFFFFFFFF)
_NONE = np.uint64(0)


def _compiled(function: Callable[..., Any]) -> Any:
    """Machine code is kept beside this file or in the user's cache; if neither can be written, processes compile."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return njit(nogil=True)(function)


@_compiled
def _sum_row(row: Words, factors_1: U64, factors_2: U64) -> tuple[np.uint64, np.uint64]:
    one, two = _NONE, _NONE
    for i in range(len(row)):
        word = np.uint64(row[i]) ^ SIGNS
        one += word * (factors_1[i] & _LOW)
        two += word * (factors_2[i] & _LOW)
    return one, two


@_compiled
def sum_rows(words: Words, stride: int, size: int, factors: U64, first: int, sums: U64) -> None:
    """sums[r, j] = Σ (words[r · stride + i] ^ SIGNS) · factors[j, first + i] mod 2^64, over i below `size`.

    Args:
        sums: (rows, 2).
    """
    factors_1, factors_2 = factors[0][first : first + size], factors[1][first : first + size]
    for row in range(len(sums)):
        start = row * stride
        sums[row, 0], sums[row, 1] = _sum_row(words[start : start + size], factors_1, factors_2)


@_compiled
def copy_range(
    words: Words, target: Words, size: int, first: int, masks: Words, factors: U64, totals: U64, of_rows: U64
) -> tuple[np.uint64, np.uint64]:
    """Copies words from number `first` on of a matrix with `size` words in a row, without -0 and subnormals. Returns
    both sums of the copy: those of `sum_rows` without SIGNS, each times its row's factor.

    Args:
        masks: of the exponent and of all bits of an element of the word, and of a second element or 0, 0.
        totals: sums of the first 0, 1, 2, ... factors.
        of_rows: (rows, 2).
    """
    exponent_1, element_1, exponent_2, element_2 = masks[0], masks[1], masks[2], masks[3]
    nothing = exponent_1 & ~exponent_1
    first_sum, second_sum = _NONE, _NONE
    row, left, at = first // size, first % size, 0
    while at < len(words):
        right = min(size, left + len(words) - at)
        source, copied = words[at : at + right - left], target[at : at + right - left]
        for i in range(len(source)):
            word = source[i]
            one = word & element_1 if word & exponent_1 != 0 else nothing
            other = word & element_2 if word & exponent_2 != 0 else nothing
            copied[i] = one | other
        one_sum, two_sum = _sum_row(copied, factors[0][left:right], factors[1][left:right])
        first_sum += of_rows[row, 0] * (one_sum - SIGNS * (totals[0, right] - totals[0, left]))
        second_sum += of_rows[row, 1] * (two_sum - SIGNS * (totals[1, right] - totals[1, left]))
        row, left, at = row + 1, 0, at + right - left
    return first_sum, second_sum


@_compiled
def fill_panels(words: Words, target: Words, height: int, size: int) -> None:
    """Copies rows of `size` words into panels."""
    for panel in range(len(words) // (height * size)):
        begin, end = panel * height * size, (panel + 1) * height * size
        rows, columns = words[begin:end].reshape((height, size)), target[begin:end].reshape((size, height))
        for start in range(0, size, _LINE):
            for i in range(start, min(start + _LINE, size)):
                column = columns[i]
                for row in range(height):
                    column[row] = rows[row, i]


@_compiled
def sum_panels(words: Words, height: int, size: int, factors: U64, sums: U64) -> None:
    """The same sums as `sum_rows` of a matrix in panels; `size` is a multiple of WORDS_AT_ONCE."""
    totals = np.zeros((2, height), np.uint64)
    one, two, factors_1, factors_2 = totals[0], totals[1], factors[0], factors[1]
    for panel in range(len(sums) // height):
        totals[:] = 0
        for i in range(0, size, WORDS_AT_ONCE):
            columns = words[(panel * size + i) * height : (panel * size + i + WORDS_AT_ONCE) * height]
            a, b = columns[:height], columns[height : 2 * height]
            c, d = columns[2 * height : 3 * height], columns[3 * height :]
            a_1, b_1, c_1, d_1 = factors_1[i], factors_1[i + 1], factors_1[i + 2], factors_1[i + 3]
            a_2, b_2, c_2, d_2 = factors_2[i], factors_2[i + 1], factors_2[i + 2], factors_2[i + 3]
            for row in range(height):
                w, x = np.uint64(a[row]) ^ SIGNS, np.uint64(b[row]) ^ SIGNS
                y, z = np.uint64(c[row]) ^ SIGNS, np.uint64(d[row]) ^ SIGNS
                one[row] += w * (a_1 & _LOW) + x * (b_1 & _LOW) + y * (c_1 & _LOW) + z * (d_1 & _LOW)
                two[row] += w * (a_2 & _LOW) + x * (b_2 & _LOW) + y * (c_2 & _LOW) + z * (d_2 & _LOW)
        for row in range(height):
            sums[panel * height + row, 0], sums[panel * height + row, 1] = one[row], two[row]
