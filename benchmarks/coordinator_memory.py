"""`python -m benchmarks.coordinator_memory`: the coordinator's peak memory at steps of 64 and of 8,192 samples.

The loop, the experience log, the recorder and the object store are real. The models are stand-ins that return tables of
the real shape, with 1,024 response tokens per sample. Each size runs in a separate process and Ray.
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
import ray

from actors.groups.group import ActorGroup
from actors.groups.process import as_actor
from actors.roles.recorder import RecorderWorker
from benchmarks.harness import plain_figure
from benchmarks.stand_ins import (
    DEADLINE_S,
    PROMPT_TOKENS,
    RESPONSE_TOKENS,
    StandInEngine,
    StandInModel,
    coordinator,
)
from benchmarks.table import report
from orchestrator.algorithms.experience import ExperienceSettings
from orchestrator.algorithms.ppo import Ppo
from orchestrator.garbage import collect_seldom
from orchestrator.types import Metrics, Prompt, PublishReport, SampleRequest, State

SIZES = (64, 8192)
NUM_PROMPTS = 2048
WARM_UP_STEPS = 2
STEPS = WARM_UP_STEPS + 2
OBJECT_STORE_BYTES = 2_000_000_000
MB = 1e6
TARGET_MB = 50.0


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--samples", type=int, help="measure this size in this process")
    samples = arguments.parse_args().samples
    if samples:
        peak = run(samples)
        sys.stdout.write(f"{json.dumps({'samples': samples, 'peak_bytes': peak})}\n")
        return
    peaks = {size: measure(size) / MB for size in SIZES}
    small, large = (peaks[size] for size in SIZES)
    growth = plain_figure(
        "coordinator memory growth",
        [large - small],
        "MB",
        better="lower",
        target=TARGET_MB,
        detail=f"peak at {SIZES[0]} samples of {RESPONSE_TOKENS} tokens {small:.0f}, at {SIZES[1]} {large:.0f}",
    )
    report("coordinator-memory", [growth])


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
            whole = coordinator(
                Path(folder),
                groups(),
                Requests(samples, prompts()),
                steps=STEPS,
                publisher=StandInPublisher(),
                meter=_no_meter,
            )
            collect_seldom()  # as the jobs do
            state = asyncio.run(whole.run(State(0, 0.1)))
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


@dataclass(frozen=True)
class Requests:
    """Small warm-up steps, then steps of `samples` samples, from one set of prompts."""

    samples: int
    prompts: Sequence[Prompt]

    def requests(self, step: int, _refill: int = 0) -> Sequence[SampleRequest]:
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


def groups() -> dict[str, ActorGroup]:
    """One process for the engine, one for all models, one for the recorder."""
    models = _group("models", StandInModel, {})
    arguments = {"settings": ExperienceSettings(Ppo(), samples_per_prompt=1), "run_id": "memory"}
    return {
        "rollout": _group("rollout", StandInEngine, {}),
        **dict.fromkeys(("policy", "critic", "reference", "reward"), models),
        "recorder": _group("recorder", RecorderWorker, arguments),
    }


def _group(role: str, worker: type[Any], arguments: Mapping[str, Any]) -> ActorGroup:
    return ActorGroup(role, [as_actor(worker).options(num_cpus=0.5).remote(**arguments)])


async def _no_meter(version: int) -> Metrics:
    return {}


if __name__ == "__main__":
    main()
