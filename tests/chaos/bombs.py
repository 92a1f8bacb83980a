"""Small inputs that expand to huge ones or never end. Each family generates them from a separate random generator.

To add a family: a function (folder, random) -> (work, arguments) that writes what it needs into the folder, and a line
in FAMILIES. The work is an importable function that runs in a separate process (bounded.py).
"""

from __future__ import annotations

import bz2
import gzip
import json
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.config.loader import load_config
from orchestrator.data.inputs import read_text
from orchestrator.data.kinds import PROMPTS, RANKINGS
from orchestrator.data.readers import read_all
from orchestrator.errors import DataError

Work = tuple[Callable[..., object], tuple[Any, ...]]
Family = Callable[[Path, Random], Work]
MIB = 2**20


def read(path: Path, as_prompts: bool) -> object:
    return read_all(PROMPTS if as_prompts else RANKINGS, path)


def _reading(path: Path, random: Random) -> Work:
    return read, (path, random.random() < 0.7)


# Compressed files: one compressed block, repeated many times.

PACKERS: Mapping[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bz2": bz2.compress,
    "zstd": lambda data: bytes(pa.compress(data, "zstd", asbytes=True)),
    "lz4": lambda data: bytes(pa.compress(data, "lz4", asbytes=True)),
}
_ROW = b'{"prompt": "the same", "chosen": "a", "rejected": "b"}\n'
BLOCKS: Mapping[str, bytes] = {
    "zeros": bytes(MIB),
    "blank lines": b"\n" * MIB,
    "white space": b" " * MIB,
    "brackets": b"[" * MIB,
    "one row": _ROW * (MIB // len(_ROW)),
    "empty objects": b"{}," * (MIB // 3),
    "letters": b"x" * MIB,
    "escapes": b"\\u0000" * (MIB // 6),
}
STARTS = (b"", b"[", b'{"prompt": "', b'{"prompt": "q", "x": [', b'[{"prompt": "', b"PAR1", b"{\n")


def compressed(folder: Path, random: Random) -> Work:
    pack = PACKERS[random.choice(sorted(PACKERS))]
    block = pack(BLOCKS[random.choice(sorted(BLOCKS))])
    path = folder / "file"
    with path.open("wb") as stream:
        stream.write(pack(random.choice(STARTS) or b" "))
        for _ in range(random.choice((4, 40, 400, 1200))):
            stream.write(block)
    return _reading(path, random)


def compressed_rows(folder: Path, random: Random) -> Work:
    """Distinct rows, each of which takes a hundred times its size."""
    first, count = random.randrange(10**6), random.choice((10**4, 10**5, 4 * 10**5))
    rows = "".join(f'{{"prompt":"{first + i}","chosen":"","rejected":"{i}"}}\n' for i in range(count))
    path = folder / "file"
    path.write_bytes(PACKERS[random.choice(sorted(PACKERS))](rows.encode()))
    return _reading(path, random)


# Parquet: dictionaries, run lengths and pages.


def parquet(folder: Path, random: Random) -> Work:
    make = random.choice((_repeated, _lists, _zeros, _many_rows, _many_columns))
    columns = make(random)
    table = pa.table({"chosen": columns["prompt"], "rejected": columns["prompt"], **columns})
    codec = random.choice(("zstd", "gzip", "brotli", "snappy", "none"))
    sink = pa.BufferOutputStream()
    short = random.random() < 0.8 or make is _repeated  # expanded, a column of repeated texts takes gigabytes here
    pq.write_table(table, sink, compression=codec, store_schema=False, use_dictionary=short)
    data = bytes(sink.getvalue())
    path = folder / "file"
    path.write_bytes(gzip.compress(data) if random.random() < 0.2 else data)
    return _reading(path, random)


def _repeated(random: Random) -> dict[str, Any]:
    rows, length = random.choice(((512, 4 * MIB), (25_000, 2 * MIB), (25_000, 100_000), (64, 16 * MIB)))
    codes = pa.array(np.zeros(rows, np.int32))
    found = {"prompt": pa.DictionaryArray.from_arrays(codes, pa.array(["x" * length]))}
    return {**found, "id": pa.array(range(rows))} if random.random() < 0.5 else found


def _lists(random: Random) -> dict[str, Any]:
    count = random.choice((10**5, 10**6, 2 * 10**7))
    kinds = (pa.nulls(count, pa.int8()), pa.array(np.zeros(count, np.int8)), pa.nulls(count, pa.string()))
    inner = pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), random.choice(kinds))
    return {"prompt": pa.array(["q"]), random.choice(("x", "messages", "tools")): inner}


def _zeros(random: Random) -> dict[str, Any]:
    return {"prompt": pa.array(["\0" * random.choice((MIB, 60 * MIB, 200 * MIB))])}


def _many_rows(random: Random) -> dict[str, Any]:
    codes = pa.array(np.zeros(random.choice((10**5, 10**6)), np.int32))
    return {"prompt": pa.DictionaryArray.from_arrays(codes, pa.array(["q"]))}


def _many_columns(random: Random) -> dict[str, Any]:
    return {"prompt": pa.array(["q"]), **{f"c{i}": pa.array(["a"]) for i in range(random.choice((100, 4000)))}}


# Rows of JSON.


def rows(folder: Path, random: Random) -> Work:
    count = random.choice((10**3, 10**5, 10**6, 3 * 10**6))
    values = (
        lambda: "[" * count,
        lambda: "[" * (count // 1000) + "]" * (count // 1000),
        lambda: "[" + "[]," * count + "1]",
        lambda: "[" + "{}," * count + "1]",
        lambda: "{" + ",".join(f'"k{i}":1' for i in range(count // 2)) + "}",
        lambda: "9" * count,
        lambda: '"' + "y" * 8 * count + '"',
        lambda: '"' + "\\u00e4" * count + '"',
        lambda: '[{"role":"user","content":"q"}' + ',{"role":"assistant","content":""}' * (count // 10) + "]",
        lambda: '{"a":' * (count // 100) + "1" + "}" * (count // 100),
        lambda: '"\\n\\nHuman: a\\n\\nAssistant: ' + "\\n\\nHuman: b" * (count // 4) + '\\n\\nAssistant:"',
    )
    key = random.choice(("prompt", "chosen", "messages", "tools", "id", "x", "replies"))
    text = f'{{"{key}": {random.choice(values)()}, "prompt": "q"}}'
    others = '{"prompt": "a", "chosen": "b", "rejected": "c"}'
    path = folder / "file"
    path.write_text(random.choice((f"{others}\n{text}\n", f"[{others}, {text}]", f"{text}\n{others}")))
    return _reading(path, random)


# Not regular files.


def special(folder: Path, random: Random) -> Work:
    path = folder / "file"
    random.choice((_make_pipe, _make_socket, Path.mkdir, _link("/dev/zero"), _link("gone"), _link("file"), _link("/")))(
        path
    )
    work = random.choice((read, _read_config, _read_template))
    return work, (path, True)


def _make_pipe(path: Path) -> None:
    os.mkfifo(path)


def _make_socket(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # a socket's path is limited to about 100 bytes
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)
    os.chdir(before)


def _link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def _read_config(path: Path, _: bool) -> object:
    return load_config(path)


def _read_template(path: Path, _: bool) -> object:
    return read_text(path, str(path), DataError)


# Configs and overrides.


def yaml(folder: Path, random: Random) -> Work:
    width, depth, count = random.randrange(2, 12), random.randrange(2, 16), random.choice((10**2, 10**4, 10**5))
    texts = (
        lambda: _levels("l{0}: &l{0} [{1}]\n", "l0: &l0 [x]\n", width, depth),
        lambda: _levels("l{0}: &l{0}\n  <<: [{1}]\n", "l0: &l0 {x: 1}\n", width, depth),
        lambda: _levels("l{0}: &l{0}\n  ? [{1}]\n  : x\n", "l0: &l0 [x]\n", width, depth),
        lambda: "a: &a [*a]",
        lambda: "[" * count + "]" * count,
        lambda: "- " * count,
        lambda: "a: " + "9" * count,
        lambda: "a: 1" + ":59" * count,
        lambda: "a: 0x" + "f" * count,
        lambda: "".join(f"k{i}: 1\n" for i in range(count // 2)),
        lambda: "{" + "a: b, " * count + "}",
        lambda: "a: |\n" + " x\n" * count,
        lambda: "&a " * count,
        lambda: "a: '" + "x" * 10 * count + "'",
        lambda: "rl: " + "{steps: " * (count // 100) + "}" * (count // 100),
        lambda: "reward: {rules: [" + "{function: 'a:b'}, " * count + "]}",
    )
    text = random.choice(texts)()
    if random.random() < 0.3:
        return load_config, (None, (f"{random.choice(('rl', 'reward.rules', 'a.' * count + 'b'))}={text}",))
    path = folder / "file"
    path.write_text(text)
    return load_config, (path,)


def _levels(line: str, first: str, width: int, depth: int) -> str:
    """Each line refers to the previous one `width` times: `width` to the power of `depth` values."""
    return first + "".join(line.format(i, ", ".join([f"*l{i - 1}"] * width)) for i in range(1, depth))


def other_records(folder: Path, random: Random) -> Work:
    """Rows that end too early."""
    row = json.dumps({"prompt": [{"role": "user", "content": [{"type": "text", "text": "q" * 1000}]}]})
    path = folder / "file"
    path.write_text("\n".join(row[: random.randrange(len(row))] for _ in range(random.choice((1, 10, 10_000)))))
    return _reading(path, random)


# family -> (function that makes a bomb, number of bombs in a full fuzz of 10,000 inputs)
FAMILIES: Mapping[str, tuple[Family, int]] = {
    "compressed": (compressed, 80),
    "compressed rows": (compressed_rows, 20),
    "parquet": (parquet, 60),
    "rows": (rows, 100),
    "special files": (special, 60),
    "yaml": (yaml, 150),
    "cut records": (other_records, 30),
}
