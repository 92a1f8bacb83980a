"""The pseudo-random factors of the digest: constants, equal in all processes, on all devices."""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

SEQUENCES = 2
WORD_BYTES = 4
DIGITS = 5  # of h, in base 128 from -64 to 63: columns of int8
_FEWEST = 1 << 10

U64 = npt.NDArray[np.uint64]


def rounded(size: int) -> int:
    """Few distinct sizes of tables."""
    return max(_FEWEST, 1 << (size - 1).bit_length())


@lru_cache(maxsize=64)
def of_rows(count: int, device: torch.device) -> torch.Tensor:
    """A: (count, 2), int64."""
    return _tensor(_counted(count, SEQUENCES, 1) | np.uint64(1), device)


@lru_cache(maxsize=64)
def of_rows_here(count: int) -> U64:
    """A for compiled loops."""
    return of_rows(count, torch.device("cpu")).numpy().view(np.uint64)


@lru_cache(maxsize=64)
def of_words(count: int) -> U64:
    """h: (2, count), below 2^32."""
    drawn = _counted(1, count, 2)[0]
    return np.stack([drawn & np.uint64(0xFFFFFFFF), drawn >> np.uint64(32)]) | np.uint64(1)


@lru_cache(maxsize=64)
def totals(count: int) -> U64:
    """(2, count + 1): sums mod 2^64 of the factors of the first 0, 1, 2, ... words."""
    return np.cumsum(np.pad(of_words(count), ((0, 0), (1, 0))), axis=1, dtype=np.uint64)


@lru_cache(maxsize=64)
def of_bytes(count: int, device: torch.device) -> torch.Tensor:
    """(40, count), int8: column 4q + k has the digits of h(q) in rows 10k to 10k + 9, and zeros besides."""
    num_words = -(-count // WORD_BYTES)
    spread = np.zeros((num_words, WORD_BYTES, WORD_BYTES, SEQUENCES, DIGITS), np.int8)
    rest = of_words(num_words).T.astype(np.int64)
    for digit in range(DIGITS):
        lowest = ((rest + 64) & 127) - 64
        for byte in range(WORD_BYTES):
            spread[:, byte, byte, :, digit] = lowest
        rest = (rest - lowest) >> 7
    columns = spread.reshape(num_words * WORD_BYTES, -1)[:count].T
    return _tensor(np.ascontiguousarray(columns), device)


@lru_cache(maxsize=8)
def of_digits(device: torch.device) -> torch.Tensor:
    """What a digit of a byte's factor counts: (4, 1, 5), int64."""
    return _tensor(np.array([[[1 << 8 * byte + 7 * m for m in range(DIGITS)]] for byte in range(WORD_BYTES)]), device)


@lru_cache(maxsize=1 << 16)
def of_tensor(name: str, dtype: str, whole: tuple[int, ...]) -> tuple[int, int]:
    """N_1 and N_2."""
    drawn = blake2b(f"{name}\0{dtype}\0{whole}".encode(), digest_size=16).digest()
    return int.from_bytes(drawn[:8], "little") | 1, int.from_bytes(drawn[8:], "little") | 1


def _counted(rows: int, columns: int, stream: int) -> U64:
    return _mixed(np.arange(1, rows * columns + 1, dtype=np.uint64), stream).reshape(rows, columns)


def _mixed(numbers: U64, stream: int) -> U64:
    """Pseudo-random 64-bit numbers: splitmix64 (Steele, Lea, Flood 2014) with one state per number."""
    z = (numbers + np.uint64(stream << 40)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _tensor(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    signed = array.view(np.int64) if array.dtype == np.uint64 else array
    return torch.from_numpy(signed).to(device)
