"""A data file as a stream of numbered rows. Memory holds one row (JSON) or one batch (Parquet), never the file.

Compression and kind are told by the first bytes, not by the name. Row numbers start at 1; for JSONL they are line
numbers (blank lines count and are skipped).
"""

from __future__ import annotations

import codecs
import io
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from orchestrator.errors import DataError

MAX_RECORD_BYTES = 64 * 2**20
_CHUNK_BYTES = 2**20
_BATCH_ROWS = 512
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_PARQUET_MAGIC = b"PAR1"
_BYTE_ORDER_MARK = codecs.BOM_UTF8
_URI = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):/+(?=[^/])")


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its fields, or what is wrong with it."""

    number: int
    fields: Mapping[str, Any]
    problem: str | None = None


def read_rows(path: str | Path) -> Iterator[Row]:
    """Yields the rows of a JSONL file, a JSON array or a Parquet file.

    Raises:
        DataError: no such file, unreadable, empty, truncated, or a JSON array that breaks off. A single bad row
            raises nothing: it is yielded with its `problem`.
    """
    name = str(path)
    try:
        with _open(name) as (stream, source):
            head = stream.peek(4)
            if not head:
                raise DataError(f"{name} is empty: give a file with at least one record.")
            if head.startswith(_PARQUET_MAGIC):
                yield from _parquet_rows(name, source, stream)
            elif _first_character(stream) == b"[":
                yield from _array_rows(name, stream)
            else:
                yield from _line_rows(stream)
    except FileNotFoundError:
        raise DataError(
            f"{name} does not exist: check the path (relative paths start at the working folder)."
        ) from None
    except (OSError, ValueError, OverflowError, pa.ArrowException) as error:  # values that no Python object can hold
        raise DataError(
            f"{name} can't be read: {error}. Check that it is complete and of the kind it claims to be."
        ) from None


@contextmanager
def _open(name: str) -> Iterator[tuple[io.BufferedReader, pa.NativeFile | None]]:
    """Opens a file of any pyarrow filesystem, decompressed; the second item is the seekable file, or None."""
    filesystem, inner = _locate(name)
    with ExitStack() as stack:
        file = stack.enter_context(filesystem.open_input_file(inner))
        compression = _compression(file.read(4))
        file.seek(0)
        if compression is None:
            yield stack.enter_context(_buffered(file)), file
        else:
            yield stack.enter_context(_buffered(pa.CompressedInputStream(file, compression))), None


def _locate(name: str) -> tuple[fs.FileSystem, str]:
    # pathlib folds the two slashes of "s3://bucket" into one: both spellings mean the same address.
    if _URI.match(name):
        filesystem, inner = fs.FileSystem.from_uri(_URI.sub(r"\1://", name) if not name.startswith("file:") else name)
        return filesystem, inner
    return fs.LocalFileSystem(), str(Path(name).expanduser())


def _compression(head: bytes) -> str | None:
    return next((kind for magic, kind in _COMPRESSIONS.items() if head.startswith(magic)), None)


def _buffered(stream: pa.NativeFile) -> io.BufferedReader:
    return io.BufferedReader(cast(io.RawIOBase, stream), _CHUNK_BYTES)


def _first_character(stream: io.BufferedReader) -> bytes:
    return stream.peek(_CHUNK_BYTES).removeprefix(_BYTE_ORDER_MARK).lstrip()[:1]


def _parquet_rows(name: str, source: pa.NativeFile | None, stream: io.BufferedReader) -> Iterator[Row]:
    with ExitStack() as stack:
        if source is None:  # Parquet is read from its end: a compressed one has to be unpacked first.
            unpacked = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(cast(BinaryIO, stream), unpacked, _CHUNK_BYTES)
            source = pa.PythonFile(unpacked, mode="r")
        source.seek(0)
        file = pq.ParquetFile(source)
        if not file.metadata.num_rows:
            raise DataError(f"{name} has no rows: give a file with at least one record.")
        number = 0
        for batch in file.iter_batches(batch_size=_BATCH_ROWS):
            for fields in batch.to_pylist():
                number += 1
                yield Row(number, {key: value for key, value in fields.items() if value is not None})


def _line_rows(stream: io.BufferedReader) -> Iterator[Row]:
    number = 0
    while line := stream.readline(MAX_RECORD_BYTES):
        number += 1
        if number == 1:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if len(line) == MAX_RECORD_BYTES:
            yield Row(
                number, {}, f"longer than {MAX_RECORD_BYTES >> 20} MiB; is this a text file with one record a line?"
            )
            return
        if line.strip():
            yield _row_of_line(number, line)


def _row_of_line(number: int, line: bytes) -> Row:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Row(number, {}, f"not UTF-8 text (byte {error.start + 1} of the line); convert the file to UTF-8")
    except json.JSONDecodeError as error:
        return Row(number, {}, f"not JSON: {error.msg} at column {error.colno}; write one JSON object a line")
    except RecursionError:
        return Row(number, {}, "not a record: JSON nested too deeply")
    except ValueError:
        return Row(number, {}, "not a record: a number with thousands of digits")
    return _row_of_value(number, value)


def _row_of_value(number: int, value: Any) -> Row:
    if not isinstance(value, dict):
        return Row(number, {}, f"not an object with fields but {describe(value)}")
    return Row(number, value)


def _array_rows(name: str, stream: io.BufferedReader) -> Iterator[Row]:
    """Yields the elements of one JSON array, reading it piece by piece."""
    text = _ArrayText(name, stream)
    text.skip("[")
    number = 0
    while text.next_character() != "]":
        number += 1
        yield _row_of_value(number, text.value(number))
        if text.next_character() == ",":
            text.skip(",")
        elif text.next_character() != "]":
            raise DataError(f"{name}: row {number} is not followed by ',' or ']': the JSON array is broken there.")


class _ArrayText:
    """The not yet parsed text of a JSON array."""

    def __init__(self, name: str, stream: io.BufferedReader) -> None:
        self._name, self._stream = name, stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._text, self._position = "", 0

    def next_character(self) -> str:
        while True:
            while self._position < len(self._text) and self._text[self._position].isspace():
                self._position += 1
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._read(_CHUNK_BYTES):
                raise DataError(f"{self._name}: the JSON array breaks off before its ']': is the file complete?")

    def skip(self, character: str) -> None:
        if self.next_character() == character:
            self._position += 1

    def value(self, number: int) -> Any:
        while True:
            try:
                value, self._position = self._json.raw_decode(self._text, self._position)
                return value
            except json.JSONDecodeError as error:
                if not self._may_continue(error) or not self._read(max(_CHUNK_BYTES, len(self._text))):
                    raise DataError(
                        f"{self._name}: row {number} is not JSON: {error.msg}. Fix it; later rows can't be found."
                    ) from None
            except (RecursionError, ValueError):
                raise DataError(
                    f"{self._name}: row {number} is nested too deeply or holds a number with thousands of digits."
                ) from None

    def _may_continue(self, error: json.JSONDecodeError) -> bool:
        """Whether more text could make the value complete: the parser stopped at the end of what has been read."""
        at_end = error.pos >= len(self._text) - 16 or error.msg.startswith("Unterminated string")
        return at_end and len(self._text) - self._position < MAX_RECORD_BYTES

    def _read(self, num_bytes: int) -> bool:
        data = self._stream.read(num_bytes)
        try:
            more = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError:
            raise DataError(f"{self._name} is not UTF-8 text; convert the file to UTF-8.") from None
        self._text, self._position = self._text[self._position :] + more, 0
        return bool(data)


def field_names(fields: Mapping[str, Any]) -> str:
    """Names of a row's fields, for messages; escaped where they are no text that can be printed."""
    return ", ".join(fields).encode(errors="backslashreplace").decode() or "none"


def describe(value: Any) -> str:
    """A value's kind in the words of JSON, for messages."""
    kinds = {type(None): "null", bool: "true or false", str: "text", dict: "an object", list: "a list"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")
