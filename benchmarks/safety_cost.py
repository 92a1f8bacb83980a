"""`python -m benchmarks.safety_cost RUN_FOLDER [RUN_FOLDER ...]`: what safety costs, from the metrics of real runs.

Of each run: the share of its steps that went into committing experience, into proving weights on the engines (checksums
and reading back) and into the fence, as medians over steps with their spread; and how long recoveries took, by kind.
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

from rich.console import Console
from rich.table import Table

from jobs.run_folder import ATTEMPTS, RunFolder
from orchestrator.telemetry import read_lines

FENCES_PER_STEP = 3  # before the manifest, before a checkpoint takes its place, before the line of metrics


def main(folders: Sequence[str]) -> None:
    console = Console(width=120)
    for folder in map(Path, folders):
        table = Table("part", "median s", "share of the step", "smallest to largest", title=str(folder.name))
        steps = [line["metrics"] for line in read_lines(folder / "metrics.jsonl") if line["kind"] == "step"]
        # Steps that were learned again have neither.
        steps = [step for step in steps if {"time/commit_s", "publish/verify_s"} <= step.keys()]
        fence_s = fence_seconds(folder)
        parts = {
            "commit": [step["time/commit_s"] for step in steps],
            "verification": [step["publish/verify_s"] for step in steps],
            "fence": [fence_s for _ in steps],
        }
        parts["together"] = [sum(values) for values in zip(*parts.values(), strict=True)]
        for name, seconds in parts.items():
            shares = [100 * value / step["time/step_s"] for value, step in zip(seconds, steps, strict=True)]
            spread = f"{min(shares):.3f} to {max(shares):.3f} %"
            table.add_row(name, f"{statistics.median(seconds):.4f}", f"{statistics.median(shares):.3f} %", spread)
        console.print(table)
        recoveries = defaultdict(list)
        for event in read_lines(folder / "events.jsonl"):
            if event["kind"] == "recovered":
                recoveries[event["action"]].append(event["seconds"])
        for action, seconds in recoveries.items():
            console.print(
                f"{action}: {len(seconds)} times, median {statistics.median(seconds):.1f} s "
                f"({min(seconds):.1f} to {max(seconds):.1f})"
            )


def fence_seconds(folder: Path) -> float:
    """Seconds that the fence takes in one step, measured on this run's folder."""
    newest = max(int(entry.name) for entry in (folder / ATTEMPTS).iterdir())
    run = RunFolder(folder, folder.name, newest)
    started = perf_counter()
    for _ in range(100 * FENCES_PER_STEP):
        run.require_newest()
    return (perf_counter() - started) / 100


if __name__ == "__main__":
    main(sys.argv[1:])
