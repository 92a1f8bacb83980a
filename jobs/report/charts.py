"""Charts of the report as inline SVG. Colours are CSS variables of the page, so one drawing serves dark and light."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jobs.report.data import RunData
from jobs.report.stages import Training
from orchestrator.watching.metrics import PHASES

# matplotlib does not support CSS variables: it draws with these placeholders, which are replaced in its output.
_STAND_INS: Mapping[str, str] = {
    "#010101": "var(--muted)",
    "#020202": "var(--grid)",
    **{f"#0300{number:02x}": f"var(--series-{number})" for number in range(1, 8)},
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 11.0,
    "text.color": "#010101",
    "axes.edgecolor": "#020202",
    "axes.labelcolor": "#010101",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#020202",
    "xtick.color": "#010101",
    "ytick.color": "#010101",
    "legend.frameon": False,
    "legend.fontsize": 9.5,
}
_SIZE_INCHES = (4.8, 2.7)
_MOST_POINTS = 1000  # of a curve; of longer ones every n-th step is drawn


@dataclass(frozen=True)
class Chart:
    title: str
    subtitle: str
    svg: str


def draw_charts(run: RunData, trainings: Sequence[Training] = ()) -> list[Chart]:
    """One chart per curve for which the run has numbers."""
    charts = [
        *(_training(training, name) for training in trainings for name in training.names),
        _curves(run, "Reward", "training reward, mean ± SD", {"reward/mean": "mean"}, band="reward/std"),
        _gold(run),
        _curves(run, "KL to the reference", "nats per response", {"kl/per_response": "training samples"}),
        _curves(run, "Entropy", "nats per token", {"policy/entropy": "policy"}),
        _curves(
            run,
            "Response length",
            "tokens",
            {"response/length_mean": "mean", "response/length_max": "longest"},
        ),
        _curves(
            run, "Explained variance", "of returns, by the critic or the group", {"critic/explained_variance": "values"}
        ),
        _curves(
            run,
            "Engine mismatch",
            "|learner - engine| per token, nats",
            {"engine/mismatch": "mean |log-prob difference|", "engine/mismatch_k3": "KL (k3)"},
        ),
        _phases(run),
    ]
    return [chart for chart in charts if chart is not None]


def _training(training: Training, name: str) -> Chart | None:
    words = name.rpartition("/")[2].replace("_", " ")
    return _curves(training, f"{training.stage}: {words}", "by optimizer step", {name: words})


def _curves(
    run: RunData | Training, title: str, subtitle: str, names: Mapping[str, str], *, band: str | None = None
) -> Chart | None:
    series = {label: _series(run, name) for name, label in names.items()}
    series = {label: points for label, points in series.items() if points}
    if not series:
        return None

    def draw(axes: Axes) -> None:
        for number, (label, points) in enumerate(series.items(), start=1):
            steps, values = np.array(points).T
            axes.plot(steps, values, color=_colour(number), label=label, **_line(len(points)))
            spread = dict(_series(run, band)) if band else {}
            if spread:
                spread_values = np.array([spread.get(int(step), 0.0) for step in steps])
                axes.fill_between(
                    steps, values - spread_values, values + spread_values, color=_colour(number), alpha=0.15, lw=0
                )
        if len(series) > 1:
            axes.legend(loc="best")

    return Chart(title, subtitle, _svg(title, draw))


def _gold(run: RunData) -> Chart | None:
    points = [
        (version, np.array([row.gold for row in rows])) for version, rows in sorted(run.evaluations.items()) if rows
    ]
    if not points:
        return None
    versions = [version for version, _ in points]
    means = [float(golds.mean()) for _, golds in points]
    errors = [1.96 * float(golds.std(ddof=1)) / len(golds) ** 0.5 if len(golds) > 1 else 0.0 for _, golds in points]

    def draw(axes: Axes) -> None:
        axes.errorbar(versions, means, yerr=errors, color=_colour(2), marker="o", markersize=5, lw=2, capsize=3)

    return Chart(run.score_name, "held-out prompts, mean with 95 % interval", _svg(run.score_name, draw))


def _phases(run: RunData) -> Chart | None:
    phases = {phase: dict(_series(run, f"time/{phase}_s")) for phase in PHASES}
    phases = {phase: seconds for phase, seconds in phases.items() if seconds}
    if not phases:
        return None
    steps = sorted(run.steps)

    def draw(axes: Axes) -> None:
        bottom = np.zeros(len(steps))
        for number, (phase, seconds) in enumerate(phases.items(), start=1):
            height = np.array([seconds.get(step, 0.0) for step in steps])
            axes.bar(steps, height, width=0.8, bottom=bottom, color=_colour(number), label=phase)
            bottom += height
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=4, columnspacing=1.0, handlelength=1.0)

    return Chart("Time per step", "seconds by phase; overlaps count twice", _svg("Time per step", draw))


def _series(run: RunData | Training, name: str) -> list[tuple[int, float]]:
    points = [(step, metrics[name]) for step, metrics in sorted(run.steps.items()) if name in metrics]
    return points[:: max(len(points) // _MOST_POINTS, 1)]


def _colour(number: int) -> str:
    return f"#0300{number:02x}"


def _line(num_points: int) -> dict[str, Any]:
    return {"lw": 2.0, "marker": "o" if num_points <= 25 else "", "markersize": 3.5}


def _svg(title: str, draw: Callable[[Axes], None]) -> str:
    key = re.sub(r"\W+", "-", title.lower())
    with rc_context({**_STYLE, "svg.hashsalt": key}):
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        draw(axes)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
        axes.tick_params(length=0)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), key, title)


def _inline(document: str, key: str, title: str) -> str:
    """Extracts the <svg> element of a document, makes its ids unique, and lets the page set its colours and size."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}-", svg)
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", svg, count=1)
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", svg, count=1)
    for stand_in, variable in _STAND_INS.items():
        svg = svg.replace(stand_in, variable)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)} by step" ', 1)
