"""Damages valid files as disks, transfers, editors and other programs do."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hypothesis import strategies as st

# Small in memory, because YAML aliases share their value; printed in full it would fill any disk.
BOMB = (
    "[" + ", ".join(f"&b{level} [{', '.join([f'*b{level - 1}' if level else 'x'] * 9)}]" for level in range(12)) + "]"
)
# Values in a JSON (and mostly a YAML) file. Some are not JSON, some are not text.
VALUES = (
    *("null", "true", "0", "-1", "3.5", "1e999", "-1e999", "NaN", "Infinity", "-Infinity", "9" * 400, "9" * 5000),
    *('""', '"x"', '"\\ud800"', '"\\u0000"', '"2001-99-99"', "2001-99-99", '"' + "y" * 3000 + '"', "'", '"', "", "~"),
    *("[]", "{}", "[[]]", '["a", "b"]', '[{"role": "user", "content": "hi"}]', '[{"role": []}]', '{"a": NaN}'),
    *("[" * 3000, "[" * 400 + "]" * 400, '{"a":' * 900 + "1" + "}" * 900, "[" * 990 + "]" * 990, '{"\\ud800": 1}'),
    *("!!float x", "!!int ''", "!!timestamp x", "!!python/object:os.system x", "&a [*a]", "*a", ".nan", ".inf"),
    *("0x" + "f" * 5000, "{1: 2}", "{[1]: 2}", "1:60:60", "0b", "<<: 1", "? [", "\x00", "\ufffe", BOMB),
)
Bytes = Callable[[bytes, int, int], bytes]


def _flip_bit(data: bytes, where: int, what: int) -> bytes:
    place = where % len(data)
    return data[:place] + bytes([data[place] ^ (1 << what % 8)]) + data[place + 1 :]


def _set_byte(data: bytes, where: int, what: int) -> bytes:
    place = where % len(data)
    return data[:place] + bytes([what % 256]) + data[place + 1 :]


def _truncate(data: bytes, where: int, what: int) -> bytes:
    return data[: where % len(data)]


def _cut_out(data: bytes, where: int, what: int) -> bytes:
    place = where % len(data)
    return data[:place] + data[place + 1 + what % 64 :]


def _insert(data: bytes, where: int, what: int) -> bytes:
    place = where % len(data)
    piece = (b"\x00" * 8, b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"[", b"PAR1", b"\x1f\x8b", b'"', b"}", data[:40])[
        what % 10
    ]
    return data[:place] + piece + data[place:]


def _zero_block(data: bytes, where: int, what: int) -> bytes:
    place, length = where % len(data), 1 + what % 512
    return data[:place] + bytes(min(length, len(data) - place)) + data[place + length :]


def _drop_line(data: bytes, where: int, what: int) -> bytes:
    lines = data.splitlines(keepends=True)
    place = where % len(lines)
    return b"".join(lines[:place] + lines[place + 1 + what % 3 :])


def _double_line(data: bytes, where: int, what: int) -> bytes:
    lines = data.splitlines(keepends=True)
    place = where % len(lines)
    return b"".join(lines[: place + 1] + lines[place : place + 1] * (1 + what % 3) + lines[place + 1 :])


def _swap_lines(data: bytes, where: int, what: int) -> bytes:
    lines = data.splitlines(keepends=True)
    left, right = where % len(lines), what % len(lines)
    lines[left], lines[right] = lines[right], lines[left]
    return b"".join(lines)


def _other_encoding(data: bytes, where: int, what: int) -> bytes:
    name = ("utf-16", "utf-32", "utf-16-be", "cp037", "utf-7")[what % 5]
    return data.decode("latin-1").encode(name, errors="replace")


def _replace_all(data: bytes, where: int, what: int) -> bytes:
    return (b"", b"\n", b"{}", b"[]", b"null", b"\x00" * 64, b"PAR1", b"PAR1PAR1", b"\x1f\x8b", b"(\xb5/\xfd", b"[{}]")[
        what % 11
    ]


BYTES: tuple[Bytes, ...] = (
    *(_flip_bit, _flip_bit, _set_byte, _truncate, _cut_out, _insert, _zero_block),
    *(_drop_line, _double_line, _swap_lines, _other_encoding, _replace_all),
)
PLACES = st.tuples(st.integers(0, 2**20), st.integers(0, 2**10))


def damage(data: bytes, mutations: list[tuple[Bytes, tuple[int, int]]]) -> bytes:
    for mutate, (where, what) in mutations:
        data = mutate(data, where, what) if data else data
    return data


def damages(*, most: int = 2) -> st.SearchStrategy[list[tuple[Bytes, tuple[int, int]]]]:
    return st.lists(st.tuples(st.sampled_from(BYTES), PLACES), min_size=1, max_size=most)


def with_value(content: Any, where: int, what: int) -> str:
    """JSON text of `content` in which one value, at any depth, is removed or replaced by one of VALUES."""
    content = copy.deepcopy(content)
    places = list(_places(content))
    holder, key = places[where % len(places)]
    if what % 8 == 0:
        del holder[key]
        return json.dumps(content)
    holder[key] = "@here@"
    return json.dumps(content).replace('"@here@"', VALUES[what % len(VALUES)])


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    entries = content.items() if isinstance(content, Mapping) else enumerate(content)
    for key, value in entries:
        yield content, key
        if isinstance(value, dict | list):
            yield from _places(value)
