"""`rlhf report RUN_FOLDER`: one self-contained HTML page about a run, finished or crashed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jinja2
import typer

from jobs.report.charts import draw_charts
from jobs.report.data import RunData, read_run
from jobs.report.stages import Measured, Stages, Training, read_stages
from orchestrator.errors import RlhfError
from orchestrator.evaluation import EvaluationRow
from orchestrator.run.storage import replacing
from orchestrator.watching.telemetry import clock_text

REPORT_FILE = "report.html"
_TEMPLATE = Path(__file__).with_name("report.html.j2")
_NUM_PAIRS = 12


@dataclass(frozen=True)
class Fact:
    """One line of the result table."""

    name: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Pair:
    """One held-out prompt, answered before and after the run."""

    prompt_text: str
    before: EvaluationRow
    after: EvaluationRow


def write_report(run_folder: Path) -> Path:
    """Writes report.html into the run folder and returns its path.

    Raises:
        DataError: no such folder, or a run with nothing to report yet.
        StorageError: damaged metrics, or the page can't be written.
    """
    run, stages = read_run(run_folder), read_stages(run_folder)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    page = template.render(
        run=run,
        stages=stages,
        notes=[*run.notes, *stages.notes],
        headline=_headline(run, stages),
        facts=list(result_facts(run, stages)),
        charts=draw_charts(run, stages.trainings),
        pairs=_pairs(run),
    )
    path = run_folder / REPORT_FILE
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _headline(run: RunData, stages: Stages) -> str:
    comparison = run.comparison
    if comparison is None and not run.steps and (stages.trainings or stages.measured):
        last = [f"{each.stage}: {name} {value:.3g}" for each in stages.measured[-1:] for name, value in _main(each)]
        return "; ".join(last or [f"{each.stage}: {_change(each)}" for each in stages.trainings[-3:]]) + "."
    if comparison is None:
        return "Fewer than two evaluations: no before and after to compare yet."
    if comparison.sd_first == 0.0:
        return (
            f"{run.score_name} {comparison.gold_first:.3f} → {comparison.gold_last:.3f}; the start policy's scores are "
            "all equal, so there is no standard deviation to measure the change in."
        )
    verdict = "better" if comparison.low > 0 else "worse" if comparison.high < 0 else "not clearly different"
    return (
        f"{comparison.delta_in_sd:+.2f} SD {run.score_name.lower()} on {comparison.num_prompts} held-out prompts "
        f"(95 % interval {comparison.low:+.2f} to {comparison.high:+.2f}): {verdict}."
    )


def _main(measured: Measured) -> Sequence[tuple[str, float]]:
    """The metrics that are not details of others, such as gold_win_rate of gold."""
    metrics = measured.metrics
    return [(name, metrics[name]) for name in metrics if not any(name.startswith(f"{other}_") for other in metrics)]


def _change(training: Training) -> str:
    name = training.names[0]
    first, last = training.ends(name)
    return f"{name.rpartition('/')[2]} {first:.3f} → {last:.3f}"


def _stage_facts(stages: Stages) -> Iterator[Fact]:
    for training in stages.trainings:
        held_out = [
            f"{name.rpartition('/')[2].replace('_', ' ')} {value:.3f}" for name, value in training.held_out.items()
        ]
        detail = ", ".join([f"{len(training.steps)} optimizer steps", "means of the first and last tenth", *held_out])
        yield Fact(training.stage, _change(training), detail)
    for measured in stages.measured:
        for name, value in _main(measured):
            more = {key: metric for key, metric in measured.metrics.items() if key.startswith(f"{name}_")}
            words = [f"{key.removeprefix(name)[1:].replace('_', ' ')} {metric:.3g}" for key, metric in more.items()]
            yield Fact(f"{measured.stage}: {name.replace('_', ' ')}", f"{value:.4g}", ", ".join(words))
        for unmet in measured.unmet:
            yield Fact(f"{measured.stage}: not met", unmet, "evaluate.require")


def result_facts(run: RunData, stages: Stages) -> Iterator[Fact]:
    """The result table's lines."""
    yield Fact("Status", run.status)
    yield from _stage_facts(stages)
    if run.comparison is not None:
        comparison = run.comparison
        first, last = min(run.evaluations), max(run.evaluations)
        spread = f"version {first}, SD {comparison.sd_first:.3f}"
        yield Fact(f"{run.score_name} before", f"{comparison.gold_first:.3f}", spread)
        interval = f"change 95 % interval {comparison.delta_low:+.3f} to {comparison.delta_high:+.3f}"
        yield Fact(f"{run.score_name} after", f"{comparison.gold_last:.3f}", f"version {last}, {interval}")
        if comparison.sd_first > 0.0:
            detail = f"95 % interval {comparison.low:+.2f} to {comparison.high:+.2f}, paired bootstrap"
            yield Fact("Gain", f"{comparison.delta_in_sd:+.2f} SD", detail)
        if run.num_left_out:
            detail = f"{run.num_left_out} others have no score before or after; evaluation/failed-*.jsonl says why"
            yield Fact("Prompts compared", f"{comparison.num_prompts}", detail)
    if run.best is not None and run.best.step != max(run.evaluations, default=None):
        place = f"checkpoints/step-{run.best.step:06d}"
        yield Fact("Best checkpoint", f"version {run.best.step}", f"{run.best.metric} {run.best.value:.3f}, {place}")
    if run.evaluations and (rows := run.evaluations[max(run.evaluations)]):
        kl = sum(row.kl for row in rows) / len(rows)
        yield Fact("KL per response, held out", f"{kl:.2f} nats", f"version {max(run.evaluations)}")
    if (kl_training := run.last("kl/per_response")) is not None:
        yield Fact("KL per response, training", f"{kl_training:.2f} nats", "last step")
    for accuracy in run.accuracies:
        yield Fact(accuracy.name, f"{100 * accuracy.value:.1f} %", accuracy.detail)
    for what, name in (("generated", "tokens/generated_per_s"), ("learned", "tokens/learned_per_s")):
        if (rate := run.median(name)) is not None:
            yield Fact(f"Tokens {what}", f"{rate:,.0f} / s", "median over steps, of the time spent on it")
    yield from _effort_facts(run)


def _effort_facts(run: RunData) -> Iterator[Fact]:
    if run.steps or run.num_steps_planned:
        planned = f" of {run.num_steps_planned}" if run.num_steps_planned else ""
        yield Fact("Steps", f"{len(run.steps)}{planned}")
    attempts = f"{run.num_attempts} attempts, pauses between them left out" if run.num_attempts != 1 else "1 attempt"
    yield Fact("Wall time", clock_text(run.wall_s), attempts)


def _pairs(run: RunData) -> list[Pair]:
    """The first held-out prompts by id, so that examples are not hand-picked."""
    if len(run.evaluations) < 2:
        return []
    before = _first_rows(run.evaluations[min(run.evaluations)])
    after = _first_rows(run.evaluations[max(run.evaluations)])
    common = sorted(before.keys() & after.keys())[:_NUM_PAIRS]
    return [Pair(before[key].prompt_text, before[key], after[key]) for key in common]


def _first_rows(rows: Sequence[EvaluationRow]) -> dict[str, EvaluationRow]:
    return {row.prompt_id: row for row in reversed(rows)}


def main(run_folder: Annotated[Path, typer.Argument(help="Folder of a run.")]) -> None:
    """Write report.html into a run folder and print its path."""
    try:
        path = write_report(run_folder)
    except RlhfError as error:
        typer.echo(f"report: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    typer.echo(str(path))


if __name__ == "__main__":
    typer.run(main)
