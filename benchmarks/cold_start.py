"""`python -m benchmarks.cold_start [--imports] [--steps N] [key=value ...]`: time from submission to the first samples.

Runs the PPO stage of jobs/configs/ppo.yaml alone, with a rule reward and without evaluation, through Ray's Jobs API on
a private Ray, and reads the times of events from its output and its run folder. Caches are warm: the model is already
there. Import times are measured in fresh processes and compared with those of the bare library.

The run folder stays in benchmarks/results/runs; `benchmarks.overhead` and `benchmarks.simulate` read its steps.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from benchmarks.harness import RESULTS, Figure, measure_pairs, plain_figure, ratio_figure
from benchmarks.table import report
from orchestrator.watching.telemetry import read_lines

ROOT = Path(__file__).resolve().parent.parent
RUNS = RESULTS / "runs"
TARGET_S = 30.0
STEPS = 6
DEADLINE_S = 900.0
OVERRIDES = (
    "stages=[rl]",
    "reward.name=rules",
    "reward.rules=[{function: 'actors.rewards.gold:vader_positivity'}]",
    "critic.warmup_steps=0",
    "evaluation.prompts=0",
    f"run.root={RUNS}",
)
IMPORTS = {
    "jobs.run": "torch",
    "actors.roles.policy": "torch",
    "actors.roles.reward": "torch",
    "actors.engines.vllm_engine": "vllm",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--imports", action="store_true", help="only import times")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    if not arguments.imports:
        overrides = [*OVERRIDES, f"rl.steps={arguments.steps}", *arguments.overrides]
        report("cold-start", moments(*run_job(overrides)))
    report("imports", imports())


def run_job(overrides: Sequence[str]) -> tuple[Mapping[str, float], Path]:
    """Runs the job. Returns (times of its command and its submission in seconds since the epoch, run folder).

    Raises:
        RuntimeError: the job failed; contains its last lines.
    """
    times = {"command": time.time()}
    lines: list[str] = []
    command = [sys.executable, "-m", "jobs", "quickstart", "--config", "jobs/configs/ppo.yaml", *overrides]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
        assert job.stdout
        late = threading.Timer(DEADLINE_S, job.terminate)
        late.start()
        try:
            for line in job.stdout:
                lines.append(line)
                if line.startswith("submitted ") and "submitted" not in times:
                    times["submitted"] = time.time()
        finally:
            late.cancel()
    if job.returncode or "submitted" not in times:
        raise RuntimeError(f"the job ended with {job.returncode}:\n{''.join(lines[-30:])}")
    return times, max(RUNS.iterdir(), key=lambda folder: folder.stat().st_mtime)


def moments(times: Mapping[str, float], folder: Path) -> list[Figure]:
    events = {event["kind"]: event["time"] for event in reversed(list(read_lines(folder / "events.jsonl")))}
    lines = read_lines(folder / "metrics.jsonl")
    first = next(line for line in lines if (line["stage"], line["kind"]) == ("rl", "step"))
    began = first["time"] - first["metrics"]["time/step_s"]
    after_submission = {
        "submit → placed": (events["placed"], None),
        "submit → first step begins": (began, None),
        "submit → first samples": (began + first["metrics"]["time/generate_s"], TARGET_S),
        "submit → first step done": (first["time"], None),
    }
    return [
        plain_figure("command → submit", [times["submitted"] - times["command"]], "s", better="lower"),
        *(
            plain_figure(name, [moment - times["submitted"]], "s", better="lower", target=target)
            for name, (moment, target) in after_submission.items()
        ),
    ]


def imports() -> list[Figure]:
    figures = [
        ratio_figure(
            f"import {module} ÷ import {library}",
            measure_pairs(partial(import_s, module), partial(import_s, library), pairs=3),
            "s",
            better="lower",
        )
        for module, library in IMPORTS.items()
    ]
    coordinator = [import_s("orchestrator.coordinator") for _ in range(3)]
    return [*figures, plain_figure("import orchestrator.coordinator", coordinator, "s", better="lower")]


def import_s(module: str) -> float:
    """Seconds to import `module` in a fresh process, without the interpreter's start."""
    code = f"import time; started = time.perf_counter(); import {module}; print(time.perf_counter() - started)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=DEADLINE_S
    )
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
