"""`python -m benchmarks.coordinator_scale [--rounds N]`: coordinator CPU per sample, with 10 to 1,000 actors.

The loop, its remote calls, deadlines, log and publisher are real. Actors return empty results immediately, in this
process, so the benchmark measures the coordinator's work without Ray's. A step has one shard per engine. 6 of 10 actors
are engines; policy, critic, reference and reward share the rest.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import process_time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from actors.engines.contract import UpdateReport
from actors.groups.group import ActorGroup
from actors.remote.publisher import BucketPublisher, PolicyWeights
from actors.remote.roles import ClusterMeter
from actors.weights.manifest import WeightHeader, plan
from benchmarks.harness import Figure, Pairs, measure_pairs, ratio_figure
from benchmarks.publish import AsIs
from benchmarks.stand_ins import DEADLINE_S, RESPONSE_TOKENS, SAMPLES_PER_SHARD, coordinator
from benchmarks.table import report
from orchestrator.algorithms.experience import summarise
from orchestrator.garbage import collect_seldom
from orchestrator.types import Prompt, SampleRequest, ShardRecord, ShardRequest, State

COUNTS = (10, 1000)
ENGINES_IN_TEN = 6
SCORERS = ("policy", "critic", "reference", "reward")
WARM_UP_STEPS = 1
STEPS = WARM_UP_STEPS + 4
TARGET = 1.1
TENSORS, TENSOR_BYTES, BUCKET_BYTES = 272, 1 << 20, 32 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    report("coordinator-scale", measure(parser.parse_args().rounds))


def measure(rounds: int) -> list[Figure]:
    few, many = COUNTS
    collect_seldom()  # as the jobs do
    engines = measure_pairs(partial(cpu_per_sample, many, 0), partial(cpu_per_sample, few, 0), pairs=rounds)
    whole = measure_pairs(partial(cpu_per_sample, many, None), partial(cpu_per_sample, few, None), pairs=rounds)
    return [
        _figure("engines", engines, f"one actor in each other group; {many} actors against {few}"),
        _figure("all roles", whole, f"all groups grow; {many} actors against {few}"),
    ]


def _figure(name: str, pairs: Pairs, detail: str) -> Figure:
    return ratio_figure(f"coordinator CPU per sample, {name}", pairs, "s", better="lower", target=TARGET, detail=detail)


def cpu_per_sample(actors: int, ranks: int | None) -> float:
    """CPU seconds of this process per sample of a step, after WARM_UP_STEPS.

    Args:
        ranks: ranks of each group except the engines; 0: one, None: its share of the actors.
    """
    engines = actors * ENGINES_IN_TEN // 10
    each = (actors - engines) // len(SCORERS) if ranks is None else max(ranks, 1)
    if ranks is not None:
        engines = actors - each * len(SCORERS)
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(_run(Path(folder), engines, each))


async def _run(folder: Path, engines: int, ranks: int) -> float:
    answers = _answers()
    groups = {role: _group(role, ranks, answers) for role in SCORERS}
    groups |= {"rollout": _group("rollout", engines, answers), "recorder": _group("recorder", 1, answers)}
    supervisor: Any = AsIs()
    publisher = BucketPublisher(
        groups["policy"],
        groups["rollout"],
        weights=PolicyWeights(),
        supervisor=supervisor,
        bucket_bytes=BUCKET_BYTES,
        publish_s=DEADLINE_S,
    )
    schedule = _Requests(engines * SAMPLES_PER_SHARD)
    meter = ClusterMeter({role: group for role, group in groups.items() if role != "recorder"}, run_id="scale")
    whole = coordinator(folder, groups, schedule, steps=STEPS, publisher=publisher, meter=meter)
    await whole.run(State(0, 0.1))
    return (process_time() - schedule.started) / (engines * SAMPLES_PER_SHARD * (STEPS - WARM_UP_STEPS))


@dataclass
class _Requests:
    """The same requests in every step; records the start of the first measured step."""

    samples: int
    started: float = 0.0

    def __post_init__(self) -> None:
        tokens = np.zeros(16, np.int32)
        prompts = [Prompt(f"p{row}", "What is it?", tokens) for row in range(self.samples)]
        self._requests = [SampleRequest(row, prompt, 0, row) for row, prompt in enumerate(prompts)]

    def requests(self, step: int, _refill: int = 0) -> Sequence[SampleRequest]:
        if step == WARM_UP_STEPS:
            self.started = process_time()
        return self._requests


class SimulatedActor:
    """The parts of an actor handle that ActorGroup uses. Answers in the next iteration of the event loop."""

    def __init__(self, answers: Mapping[str, Callable[..., Any]]) -> None:
        self._answers = answers
        self.serve = SimpleNamespace(remote=self._serve)
        self.serve_bulk = SimpleNamespace(options=lambda num_returns: SimpleNamespace(remote=self._bulk))

    def _serve(self, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> asyncio.Future[Any]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        loop.call_soon(future.set_result, self._answers[method](*args, **kwargs))
        return future

    def _bulk(self, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, asyncio.Future[Any]]:
        return object(), self._serve(method, args, kwargs)


def _group(role: str, count: int, answers: Mapping[str, Callable[..., Any]]) -> ActorGroup:
    actors: list[Any] = [SimulatedActor(answers) for _ in range(count)]
    return ActorGroup(role, actors)


def _answers() -> Mapping[str, Callable[..., Any]]:
    header = _header()
    scoring, publishing = (
        ("logprobs", "values", "score"),
        ("next_bucket", "begin_update", "receive_bucket", "end_publish"),
    )
    return {
        **{name: lambda *args: None for name in (*scoring, *publishing, "export")},
        "save": lambda folder: (folder / "weights").write_text("none", encoding="utf-8"),
        "generate": _counts,
        "record": partial(_record, _sums()),
        "learn": lambda tables, job: {"epochs": 1.0},
        "begin_publish": lambda *args: header,
        "finish_update": lambda version: UpdateReport(version, TENSORS, header.num_bytes, TENSORS, {}),
        "report": lambda *args: 1,
    }


def _counts(request: ShardRequest) -> dict[str, int]:
    count = len(request.requests)
    return {
        "num_samples": count,
        "num_prompt_tokens": count * 16,
        "num_response_tokens": count * RESPONSE_TOKENS,
        "version": request.step,
    }


def _header() -> WeightHeader:
    tensors = ((f"layer.{number}", torch.bfloat16, (TENSOR_BYTES // 2,)) for number in range(TENSORS))
    return plan(tensors, BUCKET_BYTES)


def _record(summary: tuple[Any, Any, Any], *args: Any, kl_coefficient: float, file: str) -> ShardRecord:
    moments, sums, extremes = summary
    tokens = SAMPLES_PER_SHARD * RESPONSE_TOKENS
    return ShardRecord(Path(file).name, "0" * 64, 1, SAMPLES_PER_SHARD, 0, tokens, moments, sums, extremes)


def _sums() -> tuple[Any, Any, Any]:
    """A recorder's result for a shard."""
    floats = pa.array([[0.5, 0.25]], pa.list_(pa.float32()))
    names = ("old_logprobs", "ref_logprobs", "engine_logprobs", "values", "returns", "advantages")
    parts = pa.array([[("length", 1.0)]], pa.map_(pa.string(), pa.float32()))
    table = pa.table(
        {
            "learn": pa.array([[True, True]], pa.list_(pa.bool_())),
            **dict.fromkeys(names, floats),
            "reward": pa.array([1.0]),
            "finish_reason": ["stop"],
            "reward_parts": parts,
        }
    )
    return summarise(table)


if __name__ == "__main__":
    main()
