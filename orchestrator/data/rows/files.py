"""Reads a data file as a stream of numbered rows. Memory holds one row (JSON) or one batch (Parquet), not the file.

Compression and kind are detected from the first bytes, not from the name. Row numbers start at 1; for JSONL they are
line numbers (blank lines count and are skipped). Limits: orchestrator/data/limits.py.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pyarrow as pa
from pyarrow import fs

from orchestrator.data.inputs import at_home, size_of_file
from orchestrator.data.limits import max_unpacked_bytes, mib
from orchestrator.data.rows.hub import hub_rows, is_hub
from orchestrator.data.rows.json_rows import BYTE_ORDER_MARK, CHUNK_BYTES, Row, line_rows, value_rows
from orchestrator.data.rows.parquet import parquet_rows, unpacked
from orchestrator.data.rows.text_rows import text_rows
from orchestrator.errors import DataError

_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\x04\x22\x4d\x18": "lz4"}
_FOREIGN = {
    b"PK\x03\x04": "a zip archive: unpack it",
    b"\xfd7zX": "an xz archive: unpack it",
    b"7z\xbc\xaf": "a 7z archive: unpack it",
    b"ARRO": "an Arrow file: write it as Parquet",
    b"vers": None,  # perhaps a Git LFS pointer
}
_LFS_POINTER = b"version https://git-lfs"
_PARQUET_MAGIC = b"PAR1"
_RECORDS = re.compile(rb"PAR1|\{|\[\s*(?:[\[{\]]|$)")  # "[Chapter 1]" begins a text
_URI = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):/+(?=[^/])")


@dataclass(frozen=True)
class _Source:
    """An open file: its bytes, decompressed, and whether they were compressed."""

    name: str
    stream: io.BufferedReader
    size: int
    is_compressed: bool


def read_rows(path: str | Path) -> Iterator[Row]:
    """Yields the rows of a JSONL file, of JSON arrays or of a Parquet file.

    Raises:
        DataError: the file is missing, unreadable, empty, truncated or beyond a limit, or a JSON array is incomplete.
            A single bad row raises nothing: it is yielded with its `problem`.
    """
    if is_hub(str(path)):
        yield from hub_rows(str(path))
        return
    with _opened(str(path)) as source:
        yield from _rows(source)


def read_text(path: str | Path) -> Iterator[Row]:
    """Yields the documents of a text file as rows {text}. Raises DataError like `read_rows`."""
    with _opened(str(path)) as source:
        _refuse_foreign(source.name, source.stream.peek(len(_LFS_POINTER)))
        yield from text_rows(source.name, source.stream)


def is_text(path: str | Path) -> bool:
    """Whether a file holds neither JSON nor Parquet."""
    if is_hub(str(path)):
        return False
    with _opened(str(path)) as source:
        head = _first_line(source.stream)
        return bool(head) and not _RECORDS.match(head)


def file_bytes(path: str | Path) -> int:
    """Size of a file in its storage; of a data set on the hub more than any limit."""
    if is_hub(str(path)):
        return sys.maxsize
    filesystem, inner = _locate(str(path))
    return int(filesystem.get_file_info(inner).size or 0)


def file_stamp(path: str | Path) -> tuple[int | None, int | None]:
    """(size, time of the last change in ns) in the file's storage; None: unknown."""
    if is_hub(str(path)):
        return None, None
    filesystem, inner = _locate(str(path))
    found = filesystem.get_file_info(inner)
    return found.size, found.mtime_ns


@contextmanager
def _opened(name: str) -> Iterator[_Source]:
    """The open file. Failures to read it become DataError."""
    try:
        with _open(name) as source:
            yield source
    except FileNotFoundError:
        raise DataError(
            f"{name} does not exist: check the path (relative paths start at the working folder)."
        ) from None
    except (OSError, ValueError, OverflowError, pa.ArrowException) as error:  # values that no Python object can hold
        raise DataError(
            f"{name} can't be read: {error}. Check that it is complete and of the kind it claims to be."
        ) from None


def _rows(source: _Source) -> Iterator[Row]:
    name, stream = source.name, source.stream
    head = stream.peek(len(_LFS_POINTER))
    if not head:
        raise DataError(f"{name} is empty: give a file with at least one record.")
    if head.startswith(_PARQUET_MAGIC):
        if source.is_compressed:
            with unpacked(name, stream) as path:
                yield from parquet_rows(name, path, source.size)
        else:
            yield from parquet_rows(name, _address(name), source.size)
        return
    _refuse_foreign(name, head)
    first_line = _first_line(stream)
    if first_line == b"{" or first_line.startswith(b"["):  # no line of JSONL is "{"
        yield from value_rows(name, stream)
    else:
        yield from line_rows(name, stream)


def _refuse_foreign(name: str, head: bytes) -> None:
    if head.startswith(_LFS_POINTER):
        raise DataError(f"{name} is a Git LFS pointer, not the file itself: run `git lfs pull`.")
    found = _FOREIGN.get(head[:4])
    if found:
        raise DataError(f"{name} is {found} (JSONL, JSON and Parquet are read, plain or gzip, zstd, bz2, lz4).")


@contextmanager
def _open(name: str) -> Iterator[_Source]:
    """Opens a file of any pyarrow filesystem, decompressed."""
    filesystem, inner = _locate(name)
    if isinstance(filesystem, fs.LocalFileSystem):
        size_of_file(inner, name, DataError)
    with ExitStack() as stack:
        file = stack.enter_context(filesystem.open_input_file(inner))
        size = file.size()
        compression = _compression(file.read(4))
        file.seek(0)
        if compression is not None:
            file = cast(pa.NativeFile, _Limited(name, pa.CompressedInputStream(file, compression), size))
        yield _Source(name, stack.enter_context(_buffered(file)), size, compression is not None)


def _locate(name: str) -> tuple[fs.FileSystem, str]:
    address = _address(name)
    if address.startswith("/"):
        return fs.LocalFileSystem(), address
    filesystem, inner = fs.FileSystem.from_uri(address)
    return filesystem, inner


def _address(name: str) -> str:
    """A URI, or the absolute path of a local file."""
    if not _URI.match(name):
        return str(at_home(name, "the file", DataError).absolute())
    # pathlib joins the two slashes of "s3://bucket" to one: both spellings mean the same address.
    return name if name.startswith("file:") else _URI.sub(r"\1://", name)


def _compression(head: bytes) -> str | None:
    return next((kind for magic, kind in _COMPRESSIONS.items() if head.startswith(magic)), None)


def _buffered(stream: pa.NativeFile) -> io.BufferedReader:
    return io.BufferedReader(cast(io.RawIOBase, stream), CHUNK_BYTES)


class _Limited(io.RawIOBase):
    """A decompressed stream whose length is limited relative to its file."""

    def __init__(self, name: str, stream: pa.NativeFile, file_size: int) -> None:
        self._name, self._stream, self._file_size = name, stream, file_size
        self._left = max_unpacked_bytes(file_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._stream.read(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise DataError(
                f"{self._name} has {self._file_size:,} bytes and unpacks to more than "
                f"{mib(max_unpacked_bytes(self._file_size))}: refused as a decompression bomb. If it is none, unpack "
                "it."
            )
        buffer[: len(data)] = data
        return len(data)


def _first_line(stream: io.BufferedReader) -> bytes:
    """The first line that is not blank, as far as it has been read."""
    start = stream.peek(CHUNK_BYTES).removeprefix(BYTE_ORDER_MARK).lstrip()
    return start.partition(b"\n")[0].rstrip()
