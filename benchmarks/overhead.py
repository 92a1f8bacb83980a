"""`python -m benchmarks.overhead [RUN_FOLDER ...]`: the share of orchestration and safety in a step's time.

Reads the metrics of real runs, by default the newest run of `benchmarks.cold_start`. Medians over steps:

    orchestration   the step's time minus that of its phases
    commit          assembling experience and writing it durably
    verification    checksums and reading back, on the slowest engine
    fence           checking that this attempt is the newest; measured now, on the run's folder

and the durations of recoveries, by kind.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter

from benchmarks.cold_start import RUNS
from benchmarks.harness import Figure, Pairs, plain_figure, ratio_figure
from benchmarks.table import report
from orchestrator.errors import DataError
from orchestrator.run.attempts import ATTEMPTS
from orchestrator.run.folder import RunFolder
from orchestrator.watching.metrics import PHASES
from orchestrator.watching.telemetry import read_lines

FENCES_PER_STEP = 3  # before the manifest, before a checkpoint becomes visible, before the line of metrics
TARGET = 0.03
PUBLISH_TARGET = 0.015
BETWEEN_STEPS = ("save", "evaluate")


def main(folders: Sequence[str]) -> None:
    for folder in map(Path, folders) if folders else [newest_run()]:
        report("overhead", [*shares(folder), *recoveries(folder)])


def newest_run() -> Path:
    """Raises DataError if there is none."""
    found = sorted(RUNS.glob("*/metrics.jsonl"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise DataError(f"no run in {RUNS}: give a run folder, or run `python -m benchmarks.cold_start` first.")
    return found[-1].parent


def shares(folder: Path) -> list[Figure]:
    """Raises DataError if no step of the run has all parts."""
    steps = [line["metrics"] for line in read_lines(folder / "metrics.jsonl") if line["kind"] == "step"]
    # Steps that were learned again have neither; the first step includes lazy loading.
    steps = [step for step in steps if {"time/commit_s", "publish/verify_s"} <= step.keys()][1:]
    if not steps:
        raise DataError(f"{folder} has no step after its first that committed and published; let it run for longer.")
    fence_s = fence_seconds(folder)
    whole = [step["time/step_s"] for step in steps]
    parts = {
        "orchestration": [_outside_phases(step) for step in steps],
        "commit": [step["time/commit_s"] for step in steps],
        "verification": [step["publish/verify_s"] for step in steps],
    }
    together = [sum(values) for values in zip(*parts.values(), strict=True)]
    figures = [
        ratio_figure(f"{name} ÷ step", Pairs(seconds, whole), "s", better="lower")
        for name, seconds in {**parts, "fence": [fence_s] * len(steps)}.items()
    ]
    publish = [step["time/publish_s"] for step in steps]
    return [
        *figures,
        ratio_figure(
            "overhead ÷ step",
            Pairs(together, whole),
            "s",
            better="lower",
            target=TARGET,
            detail="orchestration + commit + verification (the fence is within them)",
        ),
        ratio_figure("publish ÷ step", Pairs(publish, whole), "s", better="lower", target=PUBLISH_TARGET),
    ]


def _outside_phases(step: Mapping[str, float]) -> float:
    phases = [name for name in PHASES if name not in BETWEEN_STEPS]
    return step["time/step_s"] - sum(step.get(f"time/{name}_s", 0.0) for name in phases)


def fence_seconds(folder: Path) -> float:
    """Seconds of the fence in one step, measured on this run's folder."""
    newest = max(int(entry.name) for entry in (folder / ATTEMPTS).iterdir())
    run = RunFolder(folder, folder.name, newest)
    started = perf_counter()
    for _ in range(100 * FENCES_PER_STEP):
        run.require_newest()
    return (perf_counter() - started) / 100


def recoveries(folder: Path) -> list[Figure]:
    seconds = defaultdict(list)
    for event in read_lines(folder / "events.jsonl"):
        if event["kind"] == "recovered":
            seconds[event["action"]].append(event["seconds"])
    return [plain_figure(f"recovery: {action}", found, "s", better="lower") for action, found in seconds.items()]


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DataError as error:
        sys.exit(str(error))
