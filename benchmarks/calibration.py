"""Fits the efficiencies of a device to measured runs, and measures how well they predict others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from scipy.optimize import least_squares

from jobs.plan.report import core_of
from jobs.plan.work import layout_of, models_of, sharing_of
from orchestrator.config.loader import load_kept_config
from orchestrator.planning.costs import Lengths
from orchestrator.planning.hardware import Efficiency
from orchestrator.planning.simulation.run import simulate_steps
from orchestrator.planning.simulation.scenario import Layout, Measured, Spread
from orchestrator.watching.telemetry import read_lines

FITTED = ("generate", "score", "learn", "publish", "step")
FREE = ("learn", "forward", "decode", "links", "decode_step_s", "micro_batch_bytes", "optimizer_bytes", "step_s")
_NO_SPREAD = Spread(1, 1)
_ENOUGH_CACHE = 1e9  # tokens: on CPUs all samples of a shard are decoded together


@dataclass(frozen=True)
class Run:
    """Measurements of a run: seconds of each phase by step, and the lengths in its log."""

    name: str
    work: Measured
    layout: Layout
    seconds: Sequence[dict[str, float]]

    def part(self, steps: slice, name: str) -> Run:
        work = replace(self.work, of_step=self.work.of_step[steps])
        return replace(self, name=name, work=work, seconds=self.seconds[steps])


def read_run(folder: Path, cores: int) -> Run:
    """The steps in which policy and critic both learned, without the first, which includes warm-up. The device is a
    core of a machine like this one, with the run's compute type."""
    config = load_kept_config(folder / "config.yaml")
    lines = [line for line in read_lines(folder / "metrics.jsonl") if line["stage"] == "rl" and line["kind"] == "step"]
    learned = [line for line in lines if "policy/loss" in line["metrics"]][1:]
    trained = folder / "reward-model"
    of_step = tuple(_lengths(folder / "log" / f"step-{line['step']:06d}") for line in learned)
    models = models_of(config, trained if trained.is_dir() else None)
    work = Measured(models, config.samples_per_step, _NO_SPREAD, _NO_SPREAD, of_step, sharing=sharing_of(config))
    seconds = [{name: line["metrics"][f"time/{name}_s"] for name in FITTED} for line in learned]
    return Run(folder.name, work, layout_of(config, core_of(config), cores), seconds)


def _lengths(folder: Path) -> tuple[Lengths, Lengths]:
    tables = [
        pq.read_table(file, columns=["prompt_tokens", "response_tokens"]) for file in sorted(folder.glob("*.parquet"))
    ]
    prompts, responses = (
        np.asarray([len(tokens) for table in tables for tokens in table[name].to_pylist()], dtype=np.int64)
        for name in ("prompt_tokens", "response_tokens")
    )
    return prompts, responses


def predicted(run: Run, efficiency: Efficiency) -> Sequence[dict[str, float]]:
    """Predicted seconds of each phase by step, for the same work."""
    layout = replace(run.layout, device=replace(run.layout.device, efficiency=efficiency))
    steps = simulate_steps(run.work, layout, cache_tokens=_ENOUGH_CACHE, steps=len(run.seconds))
    return [{name: step[f"time/{name}_s"] for name in FITTED} for step in steps]


def calibrate(runs: Sequence[Run], start: Efficiency) -> Efficiency:
    """The efficiencies that best fit all phases of all runs: robust least squares of log ratios."""
    begin = np.log([getattr(start, name) for name in FREE])

    def residuals(logs: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        efficiency = replace(start, **dict(zip(FREE, np.exp(logs).tolist(), strict=True)))
        ratios = [
            told[name] / measured[name]
            for run in runs
            for told, measured in zip(predicted(run, efficiency), run.seconds, strict=True)
            for name in FITTED
        ]
        # Weak regularisation towards the start keeps poorly determined values unchanged.
        return np.concatenate([np.log(ratios), 0.01 * (logs - begin)])

    found = least_squares(residuals, begin, loss="soft_l1", f_scale=0.05, ftol=1e-4)
    return replace(start, **dict(zip(FREE, np.exp(found.x).tolist(), strict=True)))


def errors(run: Run, efficiency: Efficiency) -> dict[str, tuple[float, float, float]]:
    """(predicted, measured, relative error) of each phase, as medians over steps."""
    told = predicted(run, efficiency)
    medians = {name: (median(s[name] for s in told), median(s[name] for s in run.seconds)) for name in FITTED}
    return {name: (ours, theirs, ours / theirs - 1.0) for name, (ours, theirs) in medians.items()}


def as_arguments(efficiency: Efficiency) -> str:
    """The arguments of Efficiency in the table of devices."""
    values = asdict(efficiency)
    return ", ".join(f"{field.name}={values[field.name]:.3g}" for field in fields(efficiency))
