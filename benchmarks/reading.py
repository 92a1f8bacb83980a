"""`python -m benchmarks.reading [--rows N] [--tokens KIND]`: rows/s and memory of streaming a file, by kind of file.

With --tokens those of a run, which writes the tokens of a JSONL file to disk and then reads some of them:
demonstrations as stage sft, preferences as stage reward_model, prompts as stages that sample.

Every file has N synthetic rows (a million) and is read by a process of its own, which prints its resident memory as it
goes. The growth is the digests by which repeated rows are found, and where each row ends.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from time import perf_counter, process_time
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from actors.learning.distributed import Group
from actors.training.ranked_rows import stored_rankings
from actors.training.ranked_tokens import RankedTokens
from actors.training.stored_rows import StoredRows
from actors.training.trainer import training_batches
from benchmarks.harness import Figure, plain_figure
from benchmarks.table import report
from jobs.prepare import policy_chat, prepared_from
from jobs.stages.work.data import judged
from jobs.stages.work.data.demonstrations import store_demonstrations
from jobs.stages.work.data.storing import store
from orchestrator.config.config import Config
from orchestrator.config.sections import PromptsConfig
from orchestrator.config.trainings import DemonstrationsConfig, PreferencesConfig
from orchestrator.data.kinds import DEMONSTRATIONS, DOCUMENTS, PROMPTS, RANKINGS, Kind
from orchestrator.data.streams import Stream
from orchestrator.prompts import PromptSchedule

ROWS = 1_000_000
BATCH = 10_000
STEPS = 200  # read after the tokens were written
TARGET_MB = 1000.0
MB = 1e6
_WORDS = "a reward model ranks replies to prompts that people wrote and learns what they like about them".split()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rows", type=int, default=ROWS)
    arguments.add_argument("--tokens", choices=TOKENS, help="write the tokens of records of this kind")
    arguments.add_argument("--read", type=Path, help="read this file in this process")
    found = arguments.parse_args()
    if found.read:
        asyncio.run(TOKENS[found.tokens](found.read)) if found.tokens else read(found.read)
        return
    kinds = ("jsonl",) if found.tokens else tuple(WRITERS)
    figures = [figure for kind in kinds for figure in measure(kind, found.rows, tokens=found.tokens)]
    report("reading", figures)


def rows(count: int) -> Iterator[dict[str, str]]:
    for number in range(count):
        start = number % len(_WORDS)
        words = " ".join(_WORDS[start:] + _WORDS[:start])
        yield {"prompt": f"What is {number}? {words}", "response": f"{words} {number * 7}."}


def pairs(count: int) -> Iterator[dict[str, str]]:
    for number, row in enumerate(rows(count)):
        yield {"prompt": row["prompt"], "chosen": row["response"], "rejected": f"{number}? I don't know."}


def _lines(stream: IO[bytes], found: Iterable[dict[str, str]]) -> None:
    for row in found:
        stream.write(json.dumps(row).encode() + b"\n")


def _jsonl(path: Path, count: int) -> None:
    with path.open("wb") as stream:
        _lines(stream, rows(count))


def _pairs(path: Path, count: int) -> None:
    with path.open("wb") as stream:
        _lines(stream, pairs(count))


def _compressed(path: Path, count: int) -> None:
    with pa.output_stream(str(path)) as stream:  # by the ending of its name
        _lines(stream, rows(count))


def _array(path: Path, count: int) -> None:
    with path.open("wb") as stream:
        for number, row in enumerate(rows(count)):
            stream.write((b",\n" if number else b"[") + json.dumps(row).encode())
        stream.write(b"]")


def _parquet(path: Path, count: int) -> None:
    schema = pa.schema({"prompt": pa.string(), "response": pa.string()})
    with pq.ParquetWriter(path, schema) as writer:
        batch: list[dict[str, str]] = []
        for row in rows(count):
            batch.append(row)
            if len(batch) == BATCH:
                writer.write_table(pa.Table.from_pylist(batch, schema))
                batch = []
        if batch:
            writer.write_table(pa.Table.from_pylist(batch, schema))


def _text(path: Path, count: int) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for row in rows(count):
            stream.write(f"{row['prompt']}\n{row['response']}\n<|endoftext|>\n")


WRITERS: Mapping[str, Callable[[Path, int], None]] = {
    "jsonl": _jsonl,
    "jsonl.gz": _compressed,
    "jsonl.zst": _compressed,
    "json": _array,
    "parquet": _parquet,
    "txt": _text,
}


def measure(kind: str, count: int, *, tokens: str | None) -> list[Figure]:
    """Figures of one kind of file, from a fresh process."""
    with tempfile.TemporaryDirectory(prefix="reading") as folder:
        path = Path(folder) / f"rows.{kind}"
        (_pairs if tokens == "preferences" else WRITERS[kind])(path, count)
        command = [sys.executable, "-m", "benchmarks.reading", "--rows", str(count), "--read", str(path)]
        command += ["--tokens", tokens] if tokens else []
        root = Path(__file__).resolve().parent.parent
        done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
        detail = f"{count:,} rows, {path.stat().st_size / MB:.0f} MB"
    first, *between, last = [json.loads(line) for line in done.stdout.splitlines()]
    third = min(between, key=lambda line: abs(line["rows"] - count / 3), default=first)
    if last["rows"] != count:
        raise RuntimeError(f"{kind}: {last['rows']:,} of {count:,} rows came out")
    what = f"write the tokens of {tokens} in" if tokens else "read"
    growth = (last["rss"] - first["rss"]) / max(count - first["rows"], 1)
    return [
        plain_figure(
            f"{what} {kind}",
            [count / last["seconds"]],
            "rows/s",
            detail=f"{detail}; {count / last['cpu']:,.0f} rows per CPU second",
        ),
        plain_figure(
            f"peak memory: {what} {kind}",
            [last["peak"] / MB],
            "MB",
            better="lower",
            target=TARGET_MB,
            detail=f"RSS {first['rss'] / MB:.0f} MB at row {first['rows']:,}, {third['rss'] / MB:.0f} MB at row "
            f"{third['rows']:,}, {last['rss'] / MB:.0f} MB at the end: {growth:.0f} bytes a row",
        ),
    ]


def read(path: Path) -> None:
    """Streams a file; prints rows, seconds and resident bytes as JSON lines: ten times in a million rows, and at the
    end."""
    stream = Told(DOCUMENTS if path.suffix == ".txt" else DEMONSTRATIONS, path)
    for _ in stream:
        pass
    stream.tell(stream.report().num_records)


async def write_demonstrations(path: Path) -> None:
    """The same, while stage sft writes the tokens of the file."""
    config = Config(demonstrations=DemonstrationsConfig(path=path))
    stream = Told(DEMONSTRATIONS, path)
    with tempfile.TemporaryDirectory(prefix="tokens") as folder:
        parts = await store_demonstrations(config, policy_chat(config), stream, Path(folder), lambda text: None)
        rows = [StoredRows(part.folder) for part in parts]  # what a worker holds
        stream.tell(sum(found.num_rows for found in rows))


async def write_preferences(path: Path) -> None:
    """The same for stage reward_model; at the end the rows of some batches are packed."""
    config = Config(preferences=PreferencesConfig(path=path))
    section, chat = config.reward_model, policy_chat(config)
    stream = Told(RANKINGS, path)
    with tempfile.TemporaryDirectory(prefix="tokens") as folder:
        tokens = RankedTokens(chat, section.max_length), RankedTokens(chat, section.max_length)
        parts = await store(judged.marked(config, stream), tokens, Path(folder), lambda text: None, what="preferences")
        ranked = [stored_rankings(part.folder) for part in parts]  # what a worker holds
        for _, _, batch in islice(training_batches(ranked[0].num_records, section, 0), STEPS):
            for rows in ranked[0].micro_batches(batch, Group(), section.micro_batch_tokens):
                ranked[0].rows.pack(rows, torch.device("cpu"))
        stream.tell(sum(found.num_records for found in ranked))


async def write_prompts(path: Path) -> None:
    """The same for prompts; at the end the requests of some steps are made."""
    config = Config(prompts=PromptsConfig(path=path, format="prompt"))
    stream = Told(PROMPTS, path)
    prepared = prepared_from(config, stream, policy_chat(config))
    schedule = PromptSchedule(prepared.prompts.train, seed=0, prompts_per_step=32, samples_per_prompt=4)
    for step in range(STEPS):
        schedule.requests(step)
    stream.tell(stream.report().num_records)


TOKENS: Mapping[str, Callable[[Path], Coroutine[Any, Any, None]]] = {
    "demonstrations": write_demonstrations,
    "preferences": write_preferences,
    "prompts": write_prompts,
}


class Told(Stream[Any]):
    """Prints a line at every tenth of a million rows."""

    def __init__(self, kind: Kind[Any], path: Path) -> None:
        super().__init__(kind, path)
        self._started, self._started_cpu = perf_counter(), process_time()

    def __iter__(self) -> Iterator[Any]:
        for number, record in enumerate(super().__iter__(), 1):
            if number % (ROWS // 10) == 1:
                self.tell(number)
            yield record

    def tell(self, count: int) -> None:
        _print(count, perf_counter() - self._started, process_time() - self._started_cpu)


def _print(count: int, seconds: float, cpu: float) -> None:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    sizes = {line.split()[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Vm")}
    decoder = resource.getrusage(resource.RUSAGE_CHILDREN)  # of Parquet, once it has ended
    line = {
        "rows": count,
        "seconds": round(seconds, 2),
        "cpu": cpu + decoder.ru_utime + decoder.ru_stime,
        "rss": sizes["VmRSS:"],
        "peak": sizes["VmHWM:"] + decoder.ru_maxrss * 1024,
    }
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
