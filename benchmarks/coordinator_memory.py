"""`python -m benchmarks.coordinator_memory`: the coordinator's peak memory at steps of 64 and of 8,192 samples.

The loop, the experience log, the recorder and the object store are the real ones; the models are stand-ins that answer
with tables of the real shape, 1,024 response tokens a sample. Every size runs in a process and a Ray of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray

from actors.group import ActorGroup
from actors.learning.worker import LearnJob
from actors.process import Process
from actors.recorder import RecorderWorker
from actors.remote import RayLearner, RayRecorder, RayRollouts, ReplicatedScorer
from orchestrator import schema
from orchestrator.algorithms.experience import ExperienceSettings
from orchestrator.checkpoints import Checkpoints
from orchestrator.coordinator import Coordinator, LoopSettings
from orchestrator.experience_log import ExperienceLog
from orchestrator.failures import Unsupervised
from orchestrator.guards import Guards
from orchestrator.held_out import Evaluation
from orchestrator.sampler import Sampler
from orchestrator.telemetry import Telemetry
from orchestrator.types import Metrics, Prompt, PublishReport, SampleRequest, Sampling, ShardRequest, State

SIZES = (64, 8192)
RESPONSE_TOKENS = 1024
PROMPT_TOKENS = 128
NUM_PROMPTS = 2048
SAMPLES_PER_SHARD = 64
WARM_UP_STEPS = 2
STEPS = WARM_UP_STEPS + 2
OBJECT_STORE_BYTES = 2_000_000_000
DEADLINE_S = 120.0
MIB = 2**20


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--samples", type=int, help="measure this size in this process")
    samples = arguments.parse_args().samples
    if samples:
        peak = run(samples)
        sys.stdout.write(f"{json.dumps({'samples': samples, 'peak_bytes': peak})}\n")
        return
    peaks = {size: measure(size) for size in SIZES}
    for size, peak in peaks.items():
        sys.stdout.write(f"{size:>6} samples of {RESPONSE_TOKENS} tokens: peak {peak / MIB:.1f} MiB\n")
    growth = peaks[SIZES[-1]] - peaks[SIZES[0]]
    sys.stdout.write(f"growth: {growth / MIB:.1f} MiB\n")


def measure(samples: int) -> int:
    """Peak resident bytes of a fresh process whose coordinator ran steps of `samples` samples."""
    command = [sys.executable, "-m", "benchmarks.coordinator_memory", "--samples", str(samples)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    if done.returncode:
        raise RuntimeError(f"no peak of {samples} samples:\n{done.stderr[-4000:]}")
    return int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])


def run(samples: int) -> int:
    with tempfile.TemporaryDirectory(prefix="mem", dir="/tmp") as folder:  # Ray's socket paths must be short
        ray.init(
            num_cpus=2,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=f"{folder}/ray",
        )
        try:
            coordinator = build(Path(folder), samples)
            state = asyncio.run(coordinator.run(State(0, 0.1)))
            if state.step != STEPS:
                raise RuntimeError(f"the loop ended after {state.step} of {STEPS} steps")
            return peak_bytes()
        finally:
            ray.shutdown()


def peak_bytes() -> int:
    """VmHWM of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(kib) * 1024


class StandInEngine:
    """Answers a shard with random tokens."""

    def generate(self, request: ShardRequest) -> tuple[pa.Table, dict[str, Any]]:
        requests = request.requests
        count = len(requests)
        generator = np.random.default_rng(requests[0].seed)
        tokens_N = generator.integers(0, 50_000, count * RESPONSE_TOKENS, dtype=np.int32)
        columns = {
            "row": [item.row for item in requests],
            "prompt_id": [item.prompt.id for item in requests],
            "sample_index": [item.sample_index for item in requests],
            "seed": [item.seed for item in requests],
            "prompt_text": [item.prompt.text for item in requests],
            "response_text": ["word " * RESPONSE_TOKENS] * count,
            "prompt_tokens": [item.prompt.tokens.tolist() for item in requests],
            "response_tokens": lists(tokens_N, pa.int32()),
            "engine_logprobs": lists(random_floats(count, generator)),
            "finish_reason": ["length"] * count,
            "version": [request.step] * count,
            "meta": ["{}"] * count,
        }
        table = pa.table(columns, schema=schema.ROLLOUT)
        counts = {
            "num_samples": count,
            "num_prompt_tokens": count * PROMPT_TOKENS,
            "num_response_tokens": count * RESPONSE_TOKENS,
            "version": request.step,
        }
        return table, counts


class StandInModel:
    """Answers for every scorer, and learns nothing from whole tables."""

    def logprobs(self, table: pa.Table) -> pa.Table:
        return pa.table({"row": table["row"], "logprobs": _floats_for(table)}, schema=schema.LOGPROBS)

    def values(self, table: pa.Table) -> pa.Table:
        bootstrap = pa.array(np.zeros(table.num_rows), pa.float32())
        columns = {"row": table["row"], "values": _floats_for(table), "bootstrap_value": bootstrap}
        return pa.table(columns, schema=schema.VALUES)

    def score(self, table: pa.Table) -> pa.Table:
        count = table.num_rows
        columns = {
            "row": table["row"],
            "reward": [1.0] * count,
            "reward_parts": [[("length", 1.0)]] * count,
            "reward_error": [None] * count,
        }
        return pa.table(columns, schema=schema.REWARDS)

    def learn(self, tables: list[pa.Table], job: LearnJob) -> dict[str, float]:
        return {"step": float(job.step), "rows": float(sum(table.num_rows for table in tables)), "epochs": 1.0}

    def save(self, folder: Path) -> None:
        (folder / "weights").write_text("none", encoding="utf-8")

    def load(self, folder: Path) -> None:
        (folder / "weights").read_text(encoding="utf-8")

    def export(self, folder: Path) -> None:
        self.save(folder)


def random_floats(count: int, generator: np.random.Generator) -> npt.NDArray[np.float32]:
    return -generator.random(count * RESPONSE_TOKENS, dtype=np.float32)


def lists(flat_N: npt.NDArray[Any], kind: pa.DataType | None = None) -> pa.ListArray:
    offsets = np.arange(0, len(flat_N) + 1, RESPONSE_TOKENS, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat_N, kind or pa.float32()))


def _floats_for(table: pa.Table) -> pa.ListArray:
    generator = np.random.default_rng(int(table["seed"][0].as_py()))
    return lists(random_floats(table.num_rows, generator))


@dataclass(frozen=True)
class Requests:
    """Small steps to warm up, then steps of `samples`, from one set of prompts."""

    samples: int
    prompts: Sequence[Prompt]

    def requests(self, step: int) -> Sequence[SampleRequest]:
        count = SIZES[0] if step < WARM_UP_STEPS else self.samples
        num_prompts = len(self.prompts)
        return [
            SampleRequest(row, self.prompts[row % num_prompts], row // num_prompts, step * self.samples + row)
            for row in range(count)
        ]


def prompts() -> list[Prompt]:
    generator = np.random.default_rng(0)
    return [
        Prompt(f"p{number}", "What is it?", generator.integers(0, 50_000, PROMPT_TOKENS, dtype=np.int32))
        for number in range(NUM_PROMPTS)
    ]


class StandInPublisher:
    async def publish(self, version: int) -> PublishReport:
        return PublishReport(version, num_engines=1, num_tensors=1, num_bytes=1, seconds=0.0, verify_s=0.0)


def build(folder: Path, samples: int) -> Coordinator:
    engines = _group("rollout", StandInEngine, {})
    models = _group("models", StandInModel, {})
    settings = ExperienceSettings()
    recorder = RayRecorder(
        _group("recorder", RecorderWorker, {"settings": settings, "run_id": "memory"}), record_s=DEADLINE_S
    )
    rollouts = RayRollouts(engines, generate_s=DEADLINE_S, sleeps=False)
    limits = {"score_s": DEADLINE_S, "learn_s": DEADLINE_S, "save_s": DEADLINE_S}
    policy = RayLearner(models, StandInModel.logprobs, seed=0, **limits)
    critic = RayLearner(models, StandInModel.values, seed=0, **limits)
    reward = ReplicatedScorer(models, StandInModel.score, score_s=DEADLINE_S)
    telemetry = Telemetry(folder, "memory", 1)
    sampling = Sampling(max_new_tokens=RESPONSE_TOKENS)
    log = ExperienceLog(folder / "log", recorder, max_failed_fraction=0.0)
    return Coordinator(
        settings=LoopSettings(STEPS, 0, lambda coefficient, kl, count: coefficient),
        sampler=Sampler(
            rollouts,
            Requests(samples, prompts()),
            sampling=sampling,
            samples_per_shard=SAMPLES_PER_SHARD,
            max_staleness=0,
            takes_turns=True,
        ),
        reference=policy,
        reward=reward,
        policy=policy,
        critic=critic,
        publisher=StandInPublisher(),
        log=log,
        checkpoints=Checkpoints(
            folder / "checkpoints", {"policy": policy, "critic": critic}, every_steps=0, last_step=STEPS, keep=1
        ),
        evaluation=Evaluation(
            folder / "evaluation",
            (),
            rollouts=rollouts,
            policy=policy,
            reference=policy,
            reward=reward,
            recorder=recorder,
            telemetry=telemetry,
            sampling=sampling,
            samples_per_shard=SAMPLES_PER_SHARD,
            every_steps=0,
            last_step=STEPS,
        ),
        guards=Guards((), folder=folder, telemetry=telemetry, past=log.metrics, console=lambda line: None),
        telemetry=telemetry,
        meter=_no_meter,
        supervisor=Unsupervised(),
    )


def _group(role: str, worker: type[Any], arguments: Mapping[str, Any]) -> ActorGroup:
    served = ray.remote(type(worker.__name__, (worker, Process), {}))
    return ActorGroup(role, [served.options(num_cpus=0.5).remote(**arguments)])


async def _no_meter(version: int) -> Metrics:
    return {}


if __name__ == "__main__":
    main()
