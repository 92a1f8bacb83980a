"""`python parquet_decoder.py PATH MAX_BYTES`: the rows of a Parquet file as JSON lines on standard output.

orchestrator/data/rows/parquet.py runs it as a separate process, because memory can only be limited for a whole process.
Values that JSON does not support become text; bytes that are not text become an object {"base64": ...}. A null field of
a struct counts as missing, because columns of structs give every row the fields of all rows.
"""

from __future__ import annotations

import base64
import json
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

TOO_MUCH_MEMORY = 3
UNREADABLE = 4
_BATCH_ROWS = 64
_BATCH_BYTES = 64 * 2**20
_BUFFER_BYTES = 2**20


def main(path: str, max_bytes: int) -> int:
    _limit_memory(max_bytes)
    try:
        for line in _lines(path):
            sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
    except (MemoryError, pa.ArrowMemoryError):
        return TOO_MUCH_MEMORY
    except (OSError, ValueError, OverflowError, RecursionError, pa.ArrowException) as error:
        sys.stderr.write(f"{error}\n")
        return UNREADABLE
    return 0


def _limit_memory(max_bytes: int) -> None:
    """Limits the memory that this process may allocate in addition to its current memory."""
    sizes = Path("/proc/self/statm")
    pages = int(sizes.read_text(encoding="ascii").split()[5]) if sizes.exists() else 0
    limit = pages * resource.getpagesize() + max_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _lines(path: str) -> Iterator[bytes]:
    filesystem, inner = (fs.LocalFileSystem(), path) if path.startswith("/") else fs.FileSystem.from_uri(path)
    with filesystem.open_input_file(inner) as source:
        file = pq.ParquetFile(source, pre_buffer=False, buffer_size=_BUFFER_BYTES)
        names = file.schema_arrow.names
        if len(set(names)) < len(names):
            raise ValueError("two of its columns have the same name")
        for batch in file.iter_batches(batch_size=_batch_rows(file.metadata), use_threads=False):
            for fields in batch.to_pylist():
                yield json.dumps(plain(fields), ensure_ascii=False).encode() + b"\n"


def _batch_rows(metadata: Any) -> int:
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    longest = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0)
    return max(min(_BATCH_ROWS, _BATCH_BYTES // max(longest, 1)), 1)


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return {"base64": base64.b64encode(value).decode("ascii")}
    return value if value is None or isinstance(value, str | int | float) else str(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
