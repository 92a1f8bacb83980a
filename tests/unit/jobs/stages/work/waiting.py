"""Runs whose samples exist already, so that their stages `people` can run without Ray."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.command import say
from jobs.pipeline import run_stages
from jobs.prepare import without_prompts
from jobs.stages.work import people as stage
from orchestrator.config.config import Config
from orchestrator.config.loader import config_from_tree, load_config, to_yaml
from orchestrator.run.folder import RunFolder, open_run
from orchestrator.schema import ROLLOUT

WORDS = ("awful", "poor", "plain", "good", "wonderful", "lovely", "sad", "fine", "great", "bad")


def samples(path: Path, *, first: int = 0, num_prompts: int = 4, num_samples: int = 3) -> None:
    """Different replies to every prompt, with words that VADER knows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "row": num_samples * prompt + sample,
            "prompt_id": f"p{first + prompt}",
            "sample_index": sample,
            "seed": sample,
            "prompt_text": f"How is day {first + prompt}?",
            "response_text": f"It is a {WORDS[(first + prompt + 3 * sample) % 10]} day number {first + prompt} for us.",
            "finish_reason": "stop",
            "prompt_tokens": [1],
            "response_tokens": [2],
            "learn": [True],
            "engine_logprobs": [-0.5],
            "version": 0,
            "meta": json.dumps({"messages": [{"role": "user", "content": f"How is day {first + prompt}?"}]}),
        }
        for prompt in range(num_prompts)
        for sample in range(num_samples)
    ]
    pq.write_table(pa.Table.from_pylist(rows, ROLLOUT), path)


def config_of(
    root: Path, run_id: str = "demo", *, rounds: int = 1, run: Any = None, sections: Any = None, **people: Any
) -> Config:
    stages: Sequence[Any] = ["sample", "people"]
    tree = {
        "stages": stages if rounds == 1 else [{"rounds": rounds, "stages": stages}],
        "run": {"root": str(root), "id": run_id, **(run or {})},
        "telemetry": {"prometheus_port": 0},
        "people": {"address": None, **people},
        **(sections or {}),
    }
    return config_from_tree(tree, source="the test")


def with_samples(config: Config) -> Path:
    """Writes the samples of each round. Returns the run's folder."""
    assert config.run.id is not None
    run = config.run.root / config.run.id
    names = [entry.name for entry in config.stages if entry.kind == "sample"]
    for number, name in enumerate(names):
        samples((run if name == "sample" else run / "stages" / name) / "samples.parquet", first=3 * number)
    return run


def written(config: Config, path: Path) -> Path:
    path.write_text(to_yaml(config))
    return path


async def run_all(config: Config, say: Any = lambda line: None) -> RunFolder:
    run = open_run(config)
    await run_stages(config, run, without_prompts(None), say)  # type: ignore[arg-type]
    return run


def driver(config: Path) -> Any:
    """A process that runs or continues a run, to be killed. It is forked off a server that has imported this module."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_drive, args=(config,))
    process.start()
    return process


def _drive(config: Path) -> None:
    stage.POLL_S = 0.1
    asyncio.run(run_all(load_config(config, ()), say))
