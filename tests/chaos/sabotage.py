"""`rlhf run` with sabotage: `python -m tests.chaos.sabotage PLAN.json [arguments of run]`.

PLAN.json is a list of blows {"step", "phase", "role", "signal", "delay_s"}. When the driver first enters the phase of
the step, the role's processes get the signal after the delay. A training without rollouts has one phase,
"train". The program does not change for this: sabotage replaces the stage's telemetry, which is notified of each phase.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray

import jobs.pipeline
from jobs import run as ppo
from orchestrator.watching.telemetry import Record, Telemetry

CLASSES = {
    "rollout": "RolloutWorker",
    "policy": "PublishingPolicy",
    "critic": "CriticWorker",
    "reference": "ReferenceWorker",
    "reward": "RewardWorker",
    "recorder": "RecorderWorker",
    "trainer": "RayTrainWorker",
}


def processes_of(role: str) -> list[psutil.Process]:
    """A role's actors in this process's Ray, oldest first. Ray names processes after the class of their actor."""
    return sorted(actors(f"ray::{CLASSES[role]}"), key=lambda process: process.pid)


def actors(*titles: str) -> list[psutil.Process]:
    """Processes with these titles in the Ray that this process is connected to. Another Ray
    may belong to another run."""
    found = [p for p in psutil.process_iter(["cmdline"]) if " ".join(p.info["cmdline"] or ()).startswith(titles)]
    return [process for process in found if _is_of_this_ray(process.parent())]


def _is_of_this_ray(raylet: psutil.Process | None) -> bool:
    address = f"--gcs-address={ray.get_runtime_context().gcs_address}"
    try:
        return raylet is not None and address in " ".join(raylet.cmdline()).split()
    except psutil.Error:
        return False


def strike(blow: dict[str, Any], note: Path) -> None:
    """Sends the signal and writes the process id and the time to `note`."""
    number = getattr(signal, f"SIG{blow['signal']}")
    if blow["role"] == "driver":
        os.kill(os.getpid(), number)
    elif blow["role"] == "raylet":
        for process in psutil.process_iter(["cmdline"]):
            command = " ".join(process.info["cmdline"] or ())
            is_there = f"--node_ip_address={blow['host']}" in command
            if "raylet/raylet" in command and is_there and _is_of_this_ray(process):
                process.send_signal(number)
    else:
        there = processes_of(blow["role"])
        actor = there[blow.get("rank", 0) % len(there)]
        note.write_text(f"{actor.pid} {time.time()}", encoding="utf-8")
        actor.send_signal(number)


class Sabotaged(Telemetry):
    """Strikes each blow once over all attempts; a file next to the plan records past blows."""

    plan: Path
    blows: list[dict[str, Any]]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._strike(name, self.now()["step"])
        with super().phase(name):
            yield

    @contextmanager
    def step(self, step: int) -> Iterator[Record]:
        self._strike("train", step)
        with super().step(step) as record:
            yield record

    def _strike(self, phase: str, step: int | None) -> None:
        for index, blow in enumerate(self.blows):
            due = blow["phase"] == phase and blow["step"] in (None, step)
            struck = self.plan.with_suffix(f".{index}")
            if due and not struck.exists():
                struck.touch()
                if delay_s := blow.get("delay_s", 0.0):
                    threading.Timer(delay_s, strike, [blow, struck]).start()
                else:  # before the first call
                    strike(blow, struck)


if __name__ == "__main__":
    Sabotaged.plan = Path(sys.argv.pop(1))
    Sabotaged.blows = json.loads(Sabotaged.plan.read_text(encoding="utf-8"))
    jobs.pipeline.Telemetry = Sabotaged  # type: ignore[misc]
    ppo.typer.run(ppo.main)
