"""`python -m benchmarks.table`: shows all of benchmarks/results as one table, and writes figures.svg there."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Drawing
from rich.console import Console
from rich.table import Table

from benchmarks.harness import RESULTS, Figure, Result, read_results, write_result

PICTURE = RESULTS / "figures.svg"
_COLOURS = {True: "#2a7f3f", False: "#b3402a", None: "#5b6b7b"}
_VERDICTS = {True: "[green]met[/]", False: "[red]missed[/]", None: ""}


def main() -> None:
    results = read_results()
    show(results)
    PICTURE.write_text(draw([figure for result in results for figure in result.figures]), encoding="utf-8")


def report(name: str, figures: Sequence[Figure]) -> None:
    """Writes and shows the result of a benchmark."""
    show([write_result(name, figures)])


def show(results: Sequence[Result], console: Console | None = None) -> None:
    console = console or Console(width=150)
    table = Table("figure", "value", "spread", "target", "", "ours", "reference", "unit", "what was measured")
    for result in results:
        for figure in result.figures:
            table.add_row(*_cells(figure))
        table.add_section()
    console.print(table)
    for result in results:
        machine = result.machine
        load = " ".join(map(str, machine["load"]))
        console.print(f"{result.name}: {machine['time']}, {machine['cores']} cores, {machine['cpu']}, load {load}")


def _cells(figure: Figure) -> list[str]:
    sign = "≥" if figure.better == "higher" else "≤"
    return [
        figure.name,
        f"{figure.value:.4g}",
        f"{figure.low:.4g} to {figure.high:.4g} ({figure.pairs})",
        "" if figure.target is None else f"{sign} {figure.target:g}",
        _VERDICTS[figure.met],
        f"{figure.ours:.4g}",
        "" if figure.reference is None else f"{figure.reference:.4g}",
        figure.unit,
        figure.detail,
    ]


def draw(figures: Sequence[Figure]) -> str:
    """An SVG of all figures with a target, relative to it: values above 1 exceed the target."""
    shown = [figure for figure in figures if figure.target]
    drawing = Drawing(figsize=(9, 1 + 0.32 * len(shown)), layout="constrained")
    FigureCanvasSVG(drawing)
    axes = drawing.add_subplot()
    for place, figure in enumerate(reversed(shown)):
        low, middle, high = sorted(_reached(figure, value) for value in (figure.low, figure.value, figure.high))
        axes.barh(place, middle, color=_COLOURS[figure.met], xerr=[[middle - low], [high - middle]], height=0.6)
    axes.axvline(1.0, color="#222222", linewidth=1)
    axes.set_yticks(range(len(shown)), [f"{figure.name}  {figure.value:.3g}" for figure in reversed(shown)])
    axes.set_xscale("log")
    axes.set_xlabel("times the target (1 and above: met)")
    buffer = io.StringIO()
    drawing.savefig(buffer, format="svg")
    return buffer.getvalue()


def _reached(figure: Figure, value: float) -> float:
    """value / target, or target / value if lower is better."""
    assert figure.target
    tiny = 1e-9
    return value / figure.target if figure.better == "higher" else figure.target / max(value, tiny)


if __name__ == "__main__":
    main()
