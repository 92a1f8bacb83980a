"""`python -m benchmarks.simulate [--sweep] [--peers] [--calibrate RUN_FOLDER ...] [--check [RUN_FOLDER ...]]`

Runs the simulation at scale, and compares it with published step times and with measured runs. Without an option: sweep
and peers. Predictions of runs are written to benchmarks/results/simulate.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

from rich.console import Console
from rich.table import Table

from benchmarks import calibration, peers
from benchmarks.calibration import Run
from benchmarks.harness import Figure, Pairs, plain_figure, ratio_figure
from benchmarks.overhead import newest_run
from benchmarks.table import report
from orchestrator.errors import RlhfError
from orchestrator.planning.costs import Dimensions, LearnSettings
from orchestrator.planning.hardware import DEVICES, Efficiency
from orchestrator.planning.memory import GIB
from orchestrator.planning.simulation.scenario import MODELS, Spread, Work
from orchestrator.planning.simulation.search import Candidate, describe, search

SWEPT = (1, 4, 16, 64, 256, 1024, 4096)
SAMPLES_PER_GPU = 32
RESPONSE = Spread(512, 1024, 0.5)
PROMPT = Spread(128, 256)
QWEN_HALF_B = Dimensions(494_032_768, 24, 896, 4864, 151_936, kv_width=128, tied=True)
CORES = 2
TARGET = 0.1

console = Console(width=150, highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true", help="1 to 4,096 GPUs")
    parser.add_argument("--gpus", type=int, nargs="*", default=SWEPT, help="sizes of the sweep")
    parser.add_argument("--peers", action="store_true", help="published step times of other frameworks")
    parser.add_argument(
        "--calibrate", type=Path, nargs="+", default=[], help="fit cpu-core to the first halves of these runs' steps"
    )
    parser.add_argument(
        "--check",
        type=Path,
        nargs="*",
        help="predict these runs, with fitted or current values; by default the run of benchmarks.cold_start",
    )
    arguments = parser.parse_args()
    checked = [newest_run()] if arguments.check == [] else arguments.check or []
    chosen = arguments.sweep or arguments.peers or arguments.calibrate or checked
    if arguments.calibrate or checked:
        compare_with_runs(arguments.calibrate, checked)
    if arguments.peers or not chosen:
        compare_with_peers()
    if arguments.sweep or not chosen:
        sweep(arguments.gpus)


def compare_with_runs(fitted: Sequence[Path], others: Sequence[Path]) -> None:
    """Fits cpu-core to the first halves of runs (none: uses the table), and predicts their second halves and other runs
    from their lengths alone. All runs must have the same compute type."""
    seen, unseen = [], []
    for folder in fitted:
        run = calibration.read_run(folder, CORES)
        half = len(run.seconds) // 2
        seen.append(run.part(slice(0, half), f"{run.name}, first half"))
        unseen.append(run.part(slice(half, None), f"{run.name}, second half"))
    unseen += [calibration.read_run(folder, CORES) for folder in others]
    efficiency = [*seen, *unseen][0].layout.device.efficiency
    if seen:
        efficiency = calibration.calibrate(seen, efficiency)
    show_errors([*seen, *unseen], efficiency)
    report("simulate", [figure for run in unseen for figure in figures(run, efficiency)])


def figures(run: Run, efficiency: Efficiency) -> list[Figure]:
    found = calibration.errors(run, efficiency)
    phases = ", ".join(f"{name} {error:+.0%}" for name, (_, _, error) in found.items() if name != "step")
    told, seen = ([step["step"] for step in steps] for steps in (calibration.predicted(run, efficiency), run.seconds))
    return [
        ratio_figure(f"simulated ÷ measured step, {run.name}", Pairs(told, seen), "s", detail=phases),
        plain_figure(f"simulator off by, {run.name}", [abs(found["step"][2])], "", better="lower", target=TARGET),
    ]


def show_errors(runs: Sequence[Run], efficiency: Efficiency) -> None:
    table = Table("run", "steps", *calibration.FITTED, title="predicted s / measured s, medians over steps")
    for run in runs:
        found = calibration.errors(run, efficiency)
        cells = [f"{told:.2f} / {seen:.2f}  {error:+.0%}" for told, seen, error in found.values()]
        table.add_row(run.name, str(len(run.seconds)), *cells)
    console.print(table)
    console.print(f"by Efficiency({calibration.as_arguments(efficiency)})")


def compare_with_peers() -> None:
    table = Table("published by", "simulated", "published", "error", title="seconds per step")
    for published in peers.published():
        told = peers.predicted_s(published)
        table.add_row(published.name, f"{told:.1f}", f"{published.step_s:.1f}", f"{told / published.step_s - 1:+.0%}")
    console.print(table)


def sweep(sizes: Sequence[int]) -> None:
    """PPO with four models of 0.5 billion parameters; the number of samples per GPU is constant."""
    headings = ("GPUs", "placement", "step s", "idle", "policy idle", "memory GiB", "US $/step", "real s")
    table = Table(*headings, title=f"H100, Qwen2.5-0.5B, {SAMPLES_PER_GPU} samples per GPU, responses of 512 tokens")
    for num_gpus in sizes:
        work = Work(dict.fromkeys(MODELS, QWEN_HALF_B), SAMPLES_PER_GPU * num_gpus, PROMPT, RESPONSE)
        started = perf_counter()
        found = search(
            work, DEVICES["h100"], num_gpus, learning=_learning(), dtype="bfloat16", staleness=1, widths=(1,)
        )
        real_s = perf_counter() - started
        for candidate in _best_of_each_kind(found.candidates):
            table.add_row(str(num_gpus), *_cells(work, candidate), f"{real_s / len(found.candidates):.2f}")
        table.add_section()
    console.print(table)
    console.print("real s: of this machine, for each layout")


def _learning() -> dict[str, LearnSettings]:
    learner = LearnSettings(zero_stage=1, minibatches=4)
    return {"policy": learner, "critic": learner, "reference": LearnSettings(0), "reward": LearnSettings(0)}


def _best_of_each_kind(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The fastest layout of each kind: colocated, mixed and separate, and pipelined ones of the last two."""
    best: dict[tuple[str, int], Candidate] = {}
    for candidate in candidates:
        best.setdefault((candidate.layout.mode, candidate.layout.max_staleness), candidate)
    return list(best.values())


def _cells(work: Work, candidate: Candidate) -> Sequence[str]:
    layout, told = candidate.layout, candidate.prediction
    money = told.money(layout)
    return (
        describe(layout),
        f"{told.step_s:.1f}",
        f"{told.idle_devices:.0%}",
        f"{told.idle['policy']:.0%}",
        f"{max(part.without_cache for part in candidate.memory) / GIB:.0f}",
        "-" if money is None else f"{money:.3f}",
    )


if __name__ == "__main__":
    try:
        main()
    except RlhfError as error:
        sys.exit(str(error))
