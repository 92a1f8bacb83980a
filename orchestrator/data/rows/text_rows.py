"""Documents of a text file: separated by lines of <|endoftext|>; long ones are cut at the end of a line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from orchestrator.data.limits import MAX_RECORD_BYTES, mib
from orchestrator.data.rows.json_rows import BYTE_ORDER_MARK, Row
from orchestrator.errors import DataError

SEPARATOR = "<|endoftext|>"
PIECE_BYTES = 2**20  # a longer document becomes several


def text_rows(name: str, stream: BinaryIO) -> Iterator[Row]:
    """Rows {text}, numbered by their first line. All lines of the file but separators are in one of them.

    Raises:
        DataError: a line is no UTF-8 or longer than a record may be.
    """
    lines: list[str] = []
    size, first, number = 0, 1, 0
    while line := stream.readline(MAX_RECORD_BYTES):
        number += 1
        text = _decoded(name, number, line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line)
        is_end = text.strip() == SEPARATOR
        if not is_end:
            lines.append(text)
            size += len(line)
        if is_end or size >= PIECE_BYTES:
            yield from _row(first, lines)
            lines, size, first = [], 0, number + 1
    yield from _row(first, lines)


def _row(number: int, lines: list[str]) -> Iterator[Row]:
    text = "".join(lines)
    if text.strip():
        yield Row(number, {"text": text})


def _decoded(name: str, number: int, line: bytes) -> str:
    if len(line) >= MAX_RECORD_BYTES:
        raise DataError(f"{name}: line {number:,} is longer than {mib(MAX_RECORD_BYTES)}; is this a text file?")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{name}: line {number:,} is not UTF-8 text; convert the file to UTF-8.") from None
