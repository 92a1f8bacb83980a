"""Runs of pipelines by the command line on a cluster of the test, and what a killed one must end with."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import yaml

from orchestrator.run.storage import read_json, sha256
from orchestrator.watching.telemetry import read_lines
from tests.deadlines import of_a_run, scaled

ROOT = Path(__file__).resolve().parents[2]


def write_config(folder: Path, tree: Mapping[str, Any]) -> Path:
    """The config of a pipeline whose runs are in `folder`, where `base` is its model. Sections of `tree` replace those
    that all such pipelines have."""
    common = {
        "model": {"path": str(folder / "base"), "dtype": "float32", "max_length": 128},
        "run": {"root": str(folder)},
        "placement": {"wait_s": 5.0},
        "deadlines": of_a_run(),
        "telemetry": {"prometheus_port": None, "tensorboard": False},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump({**common, **tree}))
    return folder / "config.yaml"


def start(config: Path, cluster: str, run_id: str, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "jobs", "run", "--config", str(config), f"run.id={run_id}", *more],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": cluster},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0, *, within_s: float = 180.0) -> str:
    output, _ = process.communicate(timeout=scaled(within_s))
    assert process.returncode == code, output
    return output


def kill_when(process: subprocess.Popen[str], run: Path, made: str, *, within_s: float = 120.0) -> None:
    """Kills a run as soon as there is a file of this pattern in its folder."""
    deadline = monotonic() + scaled(within_s)
    while not list(run.glob(made)):
        assert process.poll() is None and monotonic() < deadline, process.communicate()[0]
        sleep(0.02)
    process.kill()
    process.communicate()


def require_equal_after_a_kill(
    config: Path, cluster: str, keys: Sequence[str], *, made: str, result: str, num_steps: int
) -> Path:
    """A training of `num_steps` optimizer steps with a checkpoint every 20, whose driver is killed after step 100, ends
    as an undisturbed one. Returns its run's folder.

    Args:
        made, result: names of the model's folder and of the file with the result.
    """
    whole, killed = (config.parent / name for name in ("whole", "killed"))
    finish(start(config, cluster, "whole", *keys), within_s=120.0)
    kill_when(start(config, cluster, "killed", *keys), killed, f".{made}.work/checkpoints/step-0001*")
    output = finish(start(config, cluster, "killed", *keys), within_s=120.0)
    (again,) = re.findall(rf"continues after step (\d+) of {num_steps}", output)
    assert int(again) >= 100
    assert sha256(whole / made / "model.safetensors") == sha256(killed / made / "model.safetensors")
    results = [read_json(folder / result) for folder in (whole, killed)]
    assert results[0] == results[1] | {name: results[0][name] for name in ("seconds", "path")}
    steps = [line for line in read_lines(killed / "metrics.jsonl") if line["kind"] == "step"]
    assert [line["step"] for line in steps] == list(range(num_steps))
    assert {line["attempt"] for line in steps} == {1, 2}
    return killed
