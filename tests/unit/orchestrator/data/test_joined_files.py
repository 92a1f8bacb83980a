"""Files that other programs joined, printed, cut or saved: all records are read, or the error names the fault."""

from __future__ import annotations

import bz2
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest

from orchestrator.data.kinds import PROMPTS
from orchestrator.data.readers import read_all
from orchestrator.data.rows import json_rows
from orchestrator.errors import DataError

A = b'[{"prompt": "a0"}, {"prompt": "a1"}]'
B = b'[{"prompt": "b0"}, {"prompt": "b1"}]'
LINES = b'{"prompt": "b0"}\n{"prompt": "b1"}\n'
PRINTED = json.dumps({"prompt": "b0"}, indent=2).encode() + b"\n" + json.dumps({"prompt": "b1"}, indent=2).encode()
BOM = b"\xef\xbb\xbf"
FOUR, TWO = ["a0", "a1", "b0", "b1"], ["b0", "b1"]


def _gzip(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)  # parts of a test's name, which must not contain the time


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, "zstd", asbytes=True))


@pytest.mark.parametrize("chunk", [5, 2**20])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (A + b"\n" + B + b"\n", FOUR),
        (A + B, FOUR),
        (A + b"\n" + LINES, FOUR),
        (A + b"\n\n" + PRINTED, FOUR),
        (b"[]\n" + A + LINES, FOUR),
        (PRINTED, TWO),
        (PRINTED.replace(b"\n", b"\r\n"), TWO),
        (LINES.replace(b"\n", b"\r\n"), TWO),
        (BOM + LINES, TWO),
        (BOM + A + B, FOUR),
        (b'[{"prompt": "b0"}, {"prompt": "b1"},\n]', TWO),
        (_gzip(A) + _gzip(B), FOUR),
        (_gzip(A + b"\n") + _gzip(LINES), FOUR),
        (_gzip(LINES[:17]) + _gzip(LINES[17:]), TWO),
        (zstd(A) + zstd(LINES), FOUR),
        (bz2.compress(LINES), TWO),
    ],
)
def test_every_record_of_a_joined_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, expected: list[str], chunk: int
) -> None:
    monkeypatch.setattr(json_rows, "CHUNK_BYTES", chunk)
    path = tmp_path / "file"
    path.write_bytes(content)
    records, report = read_all(PROMPTS, path)
    assert [record.text for record in records] == expected
    assert report.num_rows == len(expected)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (A + b"\nnull\n", "'null' follows row 2"),
        (A + b"]", "']' follows row 2"),
        (A + b"\x00\x00", "follows row 2"),
        (A + b"\n" + LINES[:20], "row 4 is not JSON"),
        (LINES + A, "row 3: not an object with fields but a list"),
        (b'{"prompt": "a"}{"prompt": "b"}\n', "row 1: not JSON: Extra data"),
        (b'{"prompt": "a"},\n', "row 1: not JSON: Extra data"),
        (b'{"prompt": "a"}\r{"prompt": "b"}\r', "row 1: not JSON: Extra data"),
        (LINES + BOM + LINES, "row 3: not JSON"),
        (LINES + b"\x00" * 40, "row 3: not JSON"),
        (LINES.decode().encode("utf-16"), "not UTF-8"),
        (b'{"prompt": "a", "prompt": "b"}', "a duplicate field 'prompt'"),
        (b'[{"prompt": "a", "prompt": "b"}]', "a duplicate field 'prompt'"),
        (b'{"prompt": [{"role": "user", "content": "a", "content": "b"}]}', "a duplicate field 'content'"),
        (_gzip(LINES) + b"junk", "can't be read"),
        (_gzip(_gzip(LINES)), "not UTF-8"),
        (b"PK\x03\x04" + LINES, "zip archive"),
        (b"\xfd7zXZ\x00" + LINES, "xz archive"),
        (b"ARROW1\x00\x00", "Arrow file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
        (b'{"prompt": "' + b"x" * json_rows.MAX_RECORD_BYTES + b'"}', "row 1: longer than 8 MiB"),
        (b'[{"prompt": "' + b"x" * (json_rows.MAX_RECORD_BYTES + 2**20) + b'"}]', "row 1 is longer than 8 MiB"),
    ],
)
def test_what_can_not_be_read_is_named(tmp_path: Path, content: bytes, fault: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_all(PROMPTS, path)
    assert fault in str(caught.value) and str(path) in str(caught.value)
