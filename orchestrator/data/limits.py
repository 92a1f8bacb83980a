"""Limits on the resources that a data file may use. Real files stay far below them; no file can bring down the machine.

A small file can expand to a huge one (compression, Parquet's dictionaries and run lengths), and rows of a few bytes
become Python objects of a few hundred. Plain files of any length can be read; memory holds the records that are kept.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from orchestrator.errors import DataError

MAX_RECORD_BYTES = 8 * 2**20  # size of one row as JSON
MAX_SPOOLED_BYTES = 512 * 2**20  # unpacked size of a compressed Parquet file, which needs a temporary file
MAX_DECODER_BYTES = 768 * 2**20  # memory of the process that decodes a Parquet file
MAX_BLANK_LINES = 2**20  # consecutive
SMALL_BYTES = 256 * 2**20  # unpacked size that is allowed for any file
MAX_EXPANSION = 1000  # unpacked size over file size, beyond SMALL_BYTES; gzip reaches 1032 on zeros
SMALL_KEPT_BYTES = 512 * 2**20  # memory of records that is allowed for any file
MAX_KEPT_EXPANSION = 200  # memory of records over file size, beyond SMALL_KEPT_BYTES; JSONL of tiny rows reaches 40
_SHARE_ROWS = 2**18  # after each so many rows,
_MIN_SHARE = 1e-3  # at least this share of rows must have given new records
_RECORD_BYTES = 420  # a record and the reader's notes about it, without its texts
_MESSAGE_BYTES = 100


def max_unpacked_bytes(file_bytes: int) -> int:
    return max(SMALL_BYTES, MAX_EXPANSION * file_bytes)


def mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"


class Kept:
    """Limits what is kept of the records of one file, in memory or in a temporary file.

    Args:
        path: the file, for messages.
        section: config section whose `limit` is the remedy.
        file_bytes: returns the size of the file.
    """

    def __init__(self, path: str, section: str, file_bytes: Callable[[], int]) -> None:
        self._path, self._section, self._file_bytes = path, section, file_bytes
        self._limit = SMALL_KEPT_BYTES
        self._knows_file = False

    def require(self, num_records: int, num_bytes: int) -> None:
        """Raises DataError if so many records may not take so many bytes."""
        if num_bytes <= self._limit:
            return
        if not self._knows_file:
            self._knows_file = True
            self._limit = max(SMALL_KEPT_BYTES, MAX_KEPT_EXPANSION * self._file_bytes())
            return
        raise DataError(
            f"{self._path}: its first {num_records:,} records take {mib(num_bytes)}, more than "
            f"{MAX_KEPT_EXPANSION} times the file's own size. Unpack the file (plain JSONL has no such limit), or set "
            f"{self._section}.limit."
        )


def check_share(path: str, section: str, num_rows: int, num_records: int) -> None:
    """Raises DataError if nearly all rows of a long file repeat earlier ones."""
    if num_rows % _SHARE_ROWS == 0 and num_records < num_rows * _MIN_SHARE:
        raise DataError(
            f"{path}: of its first {num_rows:,} rows only {num_records:,} give a new record, the others are repeated. "
            f"Remove the repeated rows, or set {section}.limit."
        )


def record_bytes(messages: Iterable[Any], *others: Any) -> int:
    """Bytes that a record takes as Python objects."""
    turns = sum(_MESSAGE_BYTES + sys.getsizeof(turn.content) for turn in messages)
    return _RECORD_BYTES + turns + sum(size_of(other) for other in others if other)


def size_of(value: Any) -> int:
    """Bytes that a JSON value takes as Python objects."""
    if isinstance(value, Mapping):
        return sys.getsizeof(value) + sum(size_of(key) + size_of(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return sys.getsizeof(value) + sum(map(size_of, value))
    return sys.getsizeof(value)
