"""Parquet files, decoded by a separate process (parquet_decoder.py) with limited memory.

A file of 5 kB can expand to 25 GB: dictionaries, run lengths and compression repeat what is stored once, and the memory
for decoding a batch is not known in advance. If the decoder needs too much memory, crashes on a damaged file or hangs,
only that process ends. It writes rows as JSON lines, to which the limits of JSON files apply.
"""

from __future__ import annotations

import io
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from orchestrator.data.limits import MAX_DECODER_BYTES, MAX_SPOOLED_BYTES, max_unpacked_bytes, mib
from orchestrator.data.rows import parquet_decoder
from orchestrator.data.rows.json_rows import CHUNK_BYTES, Row, line_rows
from orchestrator.errors import DataError

SILENCE_S = 300.0  # without a byte from the decoder


def parquet_rows(name: str, path: str | Path, file_size: int) -> Iterator[Row]:
    """Yields the rows of a Parquet file.

    Args:
        name: the file in messages.
        path: the file, local or of another filesystem of pyarrow.

    Raises:
        DataError: the file is damaged, has no rows, or exceeds a limit of orchestrator/data/limits.py.
    """
    limit = max_unpacked_bytes(file_size)
    command = [sys.executable, "-P", parquet_decoder.__file__, str(path), str(MAX_DECODER_BYTES)]
    environment = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"}  # others reserve more than they use
    with tempfile.TemporaryFile() as errors:
        decoder = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors
        )
        try:
            lines = _Lines(name, decoder, limit)
            number = 0
            for row in line_rows(name, io.BufferedReader(lines, CHUNK_BYTES)):
                number = row.number
                yield row
            if not lines.is_at_end:  # a row that is too long ended the reading; the decoder still has more output
                return
            _raise_failure(name, decoder, errors)
            if not number:
                raise DataError(f"{name} has no rows: give a file with at least one record.")
        finally:
            decoder.kill()
            decoder.wait()
            assert decoder.stdout is not None
            decoder.stdout.close()


@contextmanager
def unpacked(name: str, stream: io.BufferedReader) -> Iterator[Path]:
    """Unpacks a compressed Parquet file, because Parquet is read from its end."""
    with tempfile.NamedTemporaryFile(prefix="rlhf-", suffix=".parquet") as file:
        num_bytes = 0
        while data := stream.read(CHUNK_BYTES):
            num_bytes += len(data)
            if num_bytes > MAX_SPOOLED_BYTES:
                raise DataError(
                    f"{name} is a compressed Parquet file of more than {mib(MAX_SPOOLED_BYTES)}: unpack it "
                    "(Parquet compresses its own pages)."
                )
            file.write(data)
        file.flush()
        yield Path(file.name)


class _Lines(io.RawIOBase):
    """The decoder's output, up to a limit; a decoder that hangs is a failure."""

    def __init__(self, name: str, decoder: subprocess.Popen[bytes], limit: int) -> None:
        assert decoder.stdout is not None
        self._name, self._left, self._limit = name, limit, limit
        self._descriptor = decoder.stdout.fileno()
        self.is_at_end = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if not select.select([self._descriptor], [], [], SILENCE_S)[0]:
            raise DataError(f"{self._name}: no output from its decoder for {SILENCE_S:.0f} s; is the file damaged?")
        data = os.read(self._descriptor, len(buffer))
        self._left -= len(data)
        self.is_at_end = not data
        if self._left < 0:
            raise DataError(
                f"{self._name} unpacks to more than {mib(self._limit)}: refused as a decompression bomb. If it is "
                "not one, write it as JSONL."
            )
        buffer[: len(data)] = data
        return len(data)


def _raise_failure(name: str, decoder: subprocess.Popen[bytes], errors: io.BufferedRandom) -> None:
    with suppress(subprocess.TimeoutExpired):
        decoder.wait(SILENCE_S)
    code = decoder.poll()
    if code == 0:
        return
    errors.seek(0)
    told = errors.read(2**16).decode(errors="replace").strip().splitlines()
    if code == parquet_decoder.TOO_MUCH_MEMORY or any("bad_alloc" in line for line in told):
        raise DataError(
            f"{name}: decoding its rows takes more than {mib(MAX_DECODER_BYTES)} of memory. Write it in smaller rows "
            "or row groups, or as JSONL."
        )
    cause = told[-1] if told else f"the decoder ended with code {code}"
    raise DataError(f"{name} can't be read: {cause}. Check that it is complete and a Parquet file.")
