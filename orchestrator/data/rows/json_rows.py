"""Rows of JSON text: one object per line, or values that may span many lines (arrays, printed objects)."""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from orchestrator.data.limits import MAX_BLANK_LINES, MAX_RECORD_BYTES, mib
from orchestrator.data.values import describe
from orchestrator.errors import DataError

CHUNK_BYTES = 2**20
BYTE_ORDER_MARK = codecs.BOM_UTF8
_WHITE_SPACE = re.compile(r"\s*")


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its fields, or its problem."""

    number: int
    fields: Mapping[str, Any]
    problem: str | None = None


class _RepeatedKey(Exception):
    pass


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object with distinct keys. Duplicate keys are an error, because one value would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise _RepeatedKey(next(name for name, count in counts.items() if count > 1))
    return found


_JSON = json.JSONDecoder(object_pairs_hook=_fields)


def line_rows(name: str, stream: BinaryIO) -> Iterator[Row]:
    """Rows of JSONL, numbered as lines; blank lines count and are skipped."""
    number = num_blank = 0
    while line := stream.readline(MAX_RECORD_BYTES):
        number += 1
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if len(line) >= MAX_RECORD_BYTES - len(BYTE_ORDER_MARK):
            yield Row(number, {}, f"longer than {mib(MAX_RECORD_BYTES)}; is this a text file with one record per line?")
            return
        num_blank = 0 if line.strip() else num_blank + 1
        if num_blank > MAX_BLANK_LINES:
            raise DataError(f"{name}: {num_blank:,} blank lines before line {number:,}; is this a file of records?")
        if not num_blank:
            yield _row_of_line(number, line)


def _row_of_line(number: int, line: bytes) -> Row:
    try:
        value = _JSON.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Row(number, {}, f"not UTF-8 text (byte {error.start + 1} of the line); convert the file to UTF-8")
    except json.JSONDecodeError as error:
        return Row(number, {}, f"not JSON: {error.msg} at column {error.colno}; write one JSON object per line")
    except _RepeatedKey as key:
        return Row(number, {}, f"has a duplicate field {str(key)[:60]!r}; keep one of them")
    except RecursionError:
        return Row(number, {}, "not a record: JSON nested too deeply")
    except ValueError:
        return Row(number, {}, "not a record: a number with thousands of digits")
    return _row_of_value(number, value)


def _row_of_value(number: int, value: Any) -> Row:
    if not isinstance(value, dict):
        return Row(number, {}, f"not an object with fields but {describe(value)}")
    return Row(number, value)


def value_rows(name: str, stream: BinaryIO) -> Iterator[Row]:
    """Rows of consecutive JSON values: an array gives its elements, an object is a row. The text is read in pieces.

    Concatenated files (several arrays, lines after an array) are therefore read completely.
    """
    text = _Text(name, stream)
    number = 0
    while character := text.next_character():
        if character == "[":
            for value in _elements(text, number):
                number += 1
                yield _row_of_value(number, value)
        elif character == "{":
            number += 1
            yield _row_of_value(number, text.value(number))
        else:
            raise DataError(
                f"{name}: {text.excerpt()!r} follows row {number}: neither an array nor an object. Remove it, or "
                "complete it."
            )


def _elements(text: _Text, number: int) -> Iterator[Any]:
    """Elements of the array that begins at the current position."""
    text.skip("[")
    while text.inside_array() != "]":
        number += 1
        yield text.value(number)
        if text.inside_array() == ",":
            text.skip(",")
        elif text.inside_array() != "]":
            raise DataError(f"{text.name}: row {number} is not followed by ',' or ']': the JSON array is broken there.")
    text.skip("]")


class _Text:
    """The unparsed text of a stream of JSON values."""

    def __init__(self, name: str, stream: BinaryIO) -> None:
        self.name, self._stream = name, stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._position = "", 0

    def next_character(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            found = _WHITE_SPACE.match(self._text, self._position)
            self._position = found.end() if found else self._position
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._read(CHUNK_BYTES):
                return ""

    def inside_array(self) -> str:
        character = self.next_character()
        if not character:
            raise DataError(f"{self.name}: the JSON array ends without ']': is the file complete?")
        return character

    def skip(self, character: str) -> None:
        if self.next_character() == character:
            self._position += 1

    def excerpt(self) -> str:
        return self._text[self._position : self._position + 40].strip().encode(errors="backslashreplace").decode()

    def value(self, number: int) -> Any:
        while True:
            try:
                value, end = _JSON.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                if not self._may_continue(error, number) or not self._read(max(CHUNK_BYTES, len(self._text))):
                    raise DataError(
                        f"{self.name}: row {number} is not JSON: {error.msg}. Correct it; later rows can't be found."
                    ) from None
            except _RepeatedKey as key:
                raise DataError(f"{self.name}: row {number} has a duplicate field {str(key)[:60]!r}.") from None
            except (RecursionError, ValueError):
                raise DataError(
                    f"{self.name}: row {number} is nested too deeply or contains a number with thousands of digits."
                ) from None
            else:
                self._require_length(end, number)
                self._position = end
                return value

    def _may_continue(self, error: json.JSONDecodeError, number: int) -> bool:
        """Whether more text could complete the value: the parser stopped at the end of the text read so far."""
        if error.pos < len(self._text) - 16 and not error.msg.startswith("Unterminated string"):
            return False
        self._require_length(len(self._text), number)
        return True

    def _require_length(self, end: int, number: int) -> None:
        if end - self._position >= MAX_RECORD_BYTES:
            raise DataError(f"{self.name}: row {number} is longer than {mib(MAX_RECORD_BYTES)}, or never ends.")

    def _read(self, num_bytes: int) -> bool:
        data = self._stream.read(num_bytes)
        try:
            more = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError:
            raise DataError(f"{self.name} is not UTF-8 text; convert the file to UTF-8.") from None
        self._text, self._position = self._text[self._position :] + more, 0
        return bool(data)
