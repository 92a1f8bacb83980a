"""Small files that expand to huge ones are refused with a remedy; real files of any length are read."""

from __future__ import annotations

import bz2
import gzip
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.data import limits
from orchestrator.data.kinds import PROMPTS, RANKINGS
from orchestrator.data.readers import read_all
from orchestrator.data.rows import parquet
from orchestrator.errors import DataError

MIB = 2**20


def bomb(path: Path, columns: dict[str, Any], codec: str = "zstd") -> Path:
    pq.write_table(pa.table(columns), path, compression=codec, store_schema=False)
    return path


def repeated(rows: int, length: int) -> Any:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array(["x" * length]))


def nulls(count: int) -> Any:
    return pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), pa.nulls(count, pa.int8()))


PARQUET: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "25 GB of one text": (lambda: {"prompt": repeated(25_000, MIB)}, "decompression bomb"),
    "a batch of 25 GB": (lambda: {"prompt": repeated(512, 50 * MIB)}, "takes more than 768 MiB"),
    "one list of nulls": (lambda: {"prompt": ["q"], "x": nulls(50_000_000)}, "takes more than 768 MiB"),
    "one row": (lambda: {"prompt": ["x" * 20 * MIB]}, "row 1: longer than 8 MiB"),
    "one prompt": (lambda: {"prompt": repeated(300_000, 1)}, "rows only 1 give a new record"),
}


@pytest.mark.parametrize("name", PARQUET)
def test_a_small_parquet_file_can_not_ask_for_much(tmp_path: Path, name: str) -> None:
    columns, fault = PARQUET[name]
    path = bomb(tmp_path / "file", columns())
    assert path.stat().st_size < 10_000
    with pytest.raises(DataError) as caught:
        read_all(PROMPTS, path)
    assert fault in str(caught.value) and str(path) in str(caught.value)


def test_no_decoder_is_left_when_reading_stops_early(tmp_path: Path) -> None:
    path = bomb(tmp_path / "file", {"prompt": [f"q{i}" for i in range(20_000)]})
    assert read_all(PROMPTS, path, limit=1)[1].num_rows == 1
    left = [child.cmdline() for child in psutil.Process().children()]
    assert not [command for command in left if any("parquet_decoder" in part for part in command)]


@pytest.mark.parametrize(
    ("program", "fault"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended with code -11"),
        ("import time; time.sleep(60)", "no output from its decoder for 1 s"),
        ("import sys; sys.stderr.write('std::bad_alloc'); sys.exit(9)", "of memory"),
        ("import sys; sys.exit(4)", "ended with code 4"),
    ],
)
def test_a_decoder_that_ends_or_stands_still_is_a_damaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, fault: str
) -> None:
    decoder = tmp_path / "decoder.py"
    decoder.write_text(program, encoding="utf-8")
    monkeypatch.setattr(parquet.parquet_decoder, "__file__", str(decoder))
    monkeypatch.setattr(parquet, "SILENCE_S", 1.0 if "sleep" in program else 60.0)
    with pytest.raises(DataError) as caught:
        read_all(PROMPTS, bomb(tmp_path / "file", {"prompt": ["q"]}))
    assert fault in str(caught.value) and str(tmp_path / "file") in str(caught.value)


def test_a_compressed_parquet_file_fills_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "MAX_SPOOLED_BYTES", 3 * MIB)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "spool"))
    (tmp_path / "spool").mkdir()
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(b"PAR1" + bytes(20 * MIB)))
    with pytest.raises(DataError, match="compressed Parquet file of more than 3 MiB: unpack it"):
        read_all(PROMPTS, path)
    assert list((tmp_path / "spool").iterdir()) == []


def test_what_a_file_unpacks_to_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SMALL_BYTES", 10 * MIB)
    path = tmp_path / "file"
    path.write_bytes(bz2.compress((b" " * MIB + b"\n") * 40))
    with pytest.raises(DataError, match="unpacks to more than 10 MiB: refused as a decompression bomb"):
        read_all(PROMPTS, path)
    path.write_bytes(b" " * 40 * MIB + b'{"prompt": "q"}')  # not compressed: any length
    with pytest.raises(DataError, match="row 1: longer than 8 MiB"):
        read_all(PROMPTS, path)
    path.write_bytes((b" " * MIB + b"\n") * 40 + b'{"prompt": "q"}')
    assert len(read_all(PROMPTS, path)[0]) == 1


def test_kept_records_have_a_limit_by_the_size_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SMALL_KEPT_BYTES", MIB)
    path = tmp_path / "file"
    plain = "".join(f'{{"prompt":"{i}","chosen":"{i}","rejected":"x"}}\n' for i in range(20_000)).encode()
    path.write_bytes(plain)
    assert len(read_all(PROMPTS, path)[0]) == len(read_all(RANKINGS, path)[0]) == 20_000
    monkeypatch.setattr(limits, "MAX_KEPT_EXPANSION", 20)
    path.write_bytes(gzip.compress(plain))
    for kind in (PROMPTS, RANKINGS):
        with pytest.raises(DataError, match=rf"20 times the file's own size. Unpack .* set {kind.section}\.limit"):
            read_all(kind, path)
    assert len(read_all(PROMPTS, path, limit=100)[0]) == 100


@pytest.mark.parametrize("content", [b"\n" * (limits.MAX_BLANK_LINES + 2), b'{"prompt": "q"}\n' * 300_000])
def test_files_that_say_nothing_end_early(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"blank lines before line|give a new record"):
        read_all(PROMPTS, path)
