"""Reads a run folder, finished or crashed, into plain values for the report."""

from __future__ import annotations

import heapq
import json
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from actors.rewards.environment import episode_of
from jobs.stages.table import logged_name, logged_place, named_kinds, num_steps_of
from orchestrator.config.loader import translated
from orchestrator.config.yaml_text import parse_yaml
from orchestrator.errors import DataError
from orchestrator.evaluation import EVALUATION, Comparison, EvaluationRow, compare
from orchestrator.run.best import Best
from orchestrator.run.checkpoints import read_best
from orchestrator.watching.telemetry import EVENTS_FILE, METRICS_FILE, read_lines

NUM_EXTREMES = 3
_SAMPLE_COLUMNS = ["prompt_id", "prompt_text", "response_text", "reward", "meta"]


@dataclass(frozen=True)
class Sample:
    """One response with the score by which it is ranked, and the step that sampled it (or the evaluated version).
    `spans`: its parts in a conversation with an environment, as (whether it is learned, text)."""

    step: int
    prompt_text: str
    response_text: str
    score: float
    spans: Sequence[tuple[bool, str]] = ()


@dataclass(frozen=True)
class Extremes:
    best: Sequence[Sample]
    worst: Sequence[Sample]


@dataclass(frozen=True)
class Accuracy:
    """The share of held-out pairs that a stage's model puts in order."""

    name: str
    value: float
    detail: str


@dataclass(frozen=True)
class RunData:
    """Everything that the report shows.

    Args:
        steps: metrics by step of the stage that learns from a log.
        evaluations: rows by version.
        comparison: last evaluation against the first; None with fewer than two.
        num_left_out: prompts without a score in one of the two, which are not compared.
        rewards: extremes by training reward over the experience log.
        golds: extremes by gold score of the last evaluation.
        best: the best checkpoint by evaluation; None: there is none.
        score_name: the name shown for "gold".
        status: "finished", "failed: <why>" or "not finished".
        wall_s: seconds between first and last event, summed over attempts.
        notes: what could not be read.
    """

    run_id: str
    config_text: str
    num_steps_planned: int | None
    steps: Mapping[int, Mapping[str, float]]
    evaluations: Mapping[int, Sequence[EvaluationRow]]
    comparison: Comparison | None
    num_left_out: int
    rewards: Extremes
    golds: Extremes
    score_name: str
    accuracies: Sequence[Accuracy]
    best: Best | None
    status: str
    wall_s: float
    num_attempts: int
    notes: Sequence[str]

    def median(self, name: str) -> float | None:
        values = [metrics[name] for metrics in self.steps.values() if name in metrics]
        return statistics.median(values) if values else None

    def last(self, name: str) -> float | None:
        values = [metrics[name] for _, metrics in sorted(self.steps.items()) if name in metrics]
        return values[-1] if values else None


def read_run(folder: Path) -> RunData:
    """Reads a run folder.

    Raises:
        DataError: no such folder, or nothing in it to report.
        StorageError: metrics.jsonl or events.jsonl is damaged before its last line.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; give the folder of a run (it holds {METRICS_FILE}).")
    notes: list[str] = []
    lines, events = read_lines(folder / METRICS_FILE), read_lines(folder / EVENTS_FILE)
    config_text, config = read_config(folder / "config.yaml", notes)
    kinds = named_kinds(config.get("stages")) or {"rl": "rl"}
    logged = logged_name(kinds)
    place = logged_place(folder, kinds)
    asked: dict[int, set[str]] = {}
    evaluations = dict(_evaluations(place, notes, asked))
    if not lines and not evaluations:
        raise DataError(
            f"{folder} holds no metrics and no evaluations yet: {METRICS_FILE} is missing or empty. Wait for the "
            "run's first step, or give another run folder."
        )
    comparison = _comparison(evaluations, notes)
    return RunData(
        run_id=folder.resolve().name,
        config_text=config_text,
        num_steps_planned=_planned_steps(config, kinds, logged),
        steps=_steps(lines, logged),
        evaluations=evaluations,
        comparison=comparison,
        num_left_out=_num_left_out(asked, comparison),
        rewards=extremes(_logged_samples(place, notes)),
        golds=extremes(_evaluated_samples(evaluations)),
        score_name=_score_name(config),
        accuracies=list(_accuracies(lines, events)),
        best=read_best(place / "checkpoints"),
        status=_status(events, config),
        wall_s=_wall_seconds([*lines, *events]),
        num_attempts=len({line["attempt"] for line in [*lines, *events]}),
        notes=notes,
    )


def read_config(path: Path, notes: list[str]) -> tuple[str, Mapping[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        tree = parse_yaml(text)
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} can't be read ({type(error).__name__}).")
        return "", {}
    return text, translated(tree) if isinstance(tree, dict) else {}


def _score_name(config: Mapping[str, Any]) -> str:
    """The name of the score of held-out responses: without a gold rule it is the training reward."""
    section = config.get("evaluation")
    is_reward = isinstance(section, dict) and "gold" in section and section["gold"] is None
    return "Reward" if is_reward else "Gold score"


def _planned_steps(config: Mapping[str, Any], kinds: Mapping[str, str], logged: str | None) -> int | None:
    steps = None if logged is None else num_steps_of(kinds[logged], config)
    return steps if isinstance(steps, int) else None


def _steps(lines: Sequence[Mapping[str, Any]], stage: str | None) -> dict[int, Mapping[str, float]]:
    return {
        line["step"]: {name: value for name, value in line["metrics"].items() if value is not None}
        for line in lines
        if line["kind"] == "step" and line["stage"] == stage
    }


def _evaluations(
    folder: Path, notes: list[str], asked: dict[int, set[str]]
) -> Iterator[tuple[int, list[EvaluationRow]]]:
    for path in sorted((folder / "evaluation").glob("step-*.parquet")):
        rows = read_table(path, EVALUATION.names, folder, notes)
        if rows and (number := re.search(r"\d+", path.stem)):
            asked[int(number.group())] = {row["prompt_id"] for row in rows}
            scored = [EvaluationRow(**row) for row in rows if row["gold"] is not None]
            if len(scored) < len(rows):
                notes.append(
                    f"{path.name}: {len(rows) - len(scored)} rows without a gold score are left out; "
                    f"failed-{path.stem}.jsonl says why."
                )
            yield int(number.group()), scored


def _logged_samples(folder: Path, notes: list[str]) -> Iterator[Sample]:
    for path in sorted((folder / "log").glob("step-*/**/*.parquet")):
        number = re.search(r"\d+", path.relative_to(folder / "log").parts[0])
        for row in read_table(path, _SAMPLE_COLUMNS, folder, notes):
            step = int(number.group()) if number else 0
            yield Sample(step, row["prompt_text"], row["response_text"], row["reward"], _spans(row["meta"]))


def _spans(meta: str) -> Sequence[tuple[bool, str]]:
    episode = episode_of(json.loads(meta))
    return () if episode is None else tuple((learned, text) for learned, text in episode["spans"])


def _evaluated_samples(evaluations: Mapping[int, Sequence[EvaluationRow]]) -> Iterator[Sample]:
    if evaluations:
        version = max(evaluations)
        for row in evaluations[version]:
            yield Sample(version, row.prompt_text, row.response_text, row.gold)


def read_table(path: Path, columns: Sequence[str], folder: Path, notes: list[str]) -> list[dict[str, Any]]:
    try:
        with pq.ParquetFile(path) as file:
            rows: list[dict[str, Any]] = file.read(columns=list(columns)).to_pylist()
    except (OSError, pa.ArrowException) as error:
        notes.append(f"{path.relative_to(folder)} can't be read ({type(error).__name__}).")
        return []
    missing = [name for name in columns if rows and name not in rows[0]]
    if missing:
        notes.append(f"{path.relative_to(folder)} lacks the columns {', '.join(missing)}.")
        return []
    return rows


def extremes(samples: Iterator[Sample]) -> Extremes:
    """Best and worst samples, every response text once, in one pass that keeps only a few."""
    best: list[Sample] = []
    worst: list[Sample] = []
    for sample in samples:
        best = _kept(best, sample, sign=-1)
        worst = _kept(worst, sample, sign=1)
    return Extremes(best, worst)


def _kept(kept: list[Sample], sample: Sample, *, sign: int) -> list[Sample]:
    if len(kept) == NUM_EXTREMES and sign * sample.score >= sign * kept[-1].score:
        return kept
    if any(other.response_text == sample.response_text and other.score == sample.score for other in kept):
        return kept
    return heapq.nsmallest(NUM_EXTREMES, [*kept, sample], key=lambda item: sign * item.score)


def _comparison(evaluations: Mapping[int, Sequence[EvaluationRow]], notes: list[str]) -> Comparison | None:
    if len(evaluations) < 2:
        return None
    try:
        return compare(evaluations[min(evaluations)], evaluations[max(evaluations)])
    except DataError as error:
        notes.append(str(error))
        return None


def _num_left_out(asked: Mapping[int, set[str]], comparison: Comparison | None) -> int:
    return 0 if comparison is None else len(asked[min(asked)] | asked[max(asked)]) - comparison.num_prompts


def _accuracies(lines: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]) -> Iterator[Accuracy]:
    for name, metric, of_policy in (
        ("Reward model accuracy", "reward_model/held_out_accuracy", False),
        ("Implicit reward accuracy", "preference/held_out_accuracy", True),
    ):
        measured = [event for event in events if "held_out_accuracy" in event]
        trained = [event for event in measured if (event["kind"] == "policy_trained") is of_policy]
        found = [line["metrics"].get(metric) for line in lines] + [event["held_out_accuracy"] for event in trained]
        known = [float(value) for value in found if value is not None]
        if known:
            yield Accuracy(name, known[-1], _detail(trained[-1] if trained else {}))


def _detail(trained: Mapping[str, Any]) -> str:
    parts = [f"{trained['num_pairs']} held-out pairs" if "num_pairs" in trained else "held-out pairs"]
    if trained.get("interval"):
        low, high = trained["interval"]
        parts.append(f"95 % interval {100 * low:.1f} to {100 * high:.1f} %")
    if trained.get("kendall_tau") is not None:
        parts.append(f"Kendall tau against gold {trained['kendall_tau']:.2f}")
    if heads := trained.get("heads"):
        parts.append(_detail_of_heads(heads))
    return ", ".join(parts)


def _detail_of_heads(heads: Mapping[str, Any]) -> str:
    accuracies = [f"{100 * accuracy:.1f} %" for accuracy in heads["accuracies"] if accuracy is not None]
    apart = [f"{name} {heads[name]:.3g}" for name in ("right", "wrong") if heads[name] is not None]
    return f"heads alone {', '.join(accuracies)}; mean disagreement on pairs: {', '.join(apart) or 'unknown'}"


def _status(events: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> str:
    last = next((event for event in reversed(events) if event["kind"].startswith(("stage_", "run_"))), None)
    if last is None:
        return "not finished"
    if last["kind"].endswith("_failed"):
        return f"failed: {last.get('error', 'no reason recorded')}"
    none: Mapping[str, Any] = {}
    begun = next((event for event in reversed(events) if event["kind"] == "stage_started"), none)
    stages = named_kinds(begun.get("stages") or config.get("stages"))
    is_last = not stages or last.get("stage") == list(stages)[-1]
    return "finished" if last["kind"].endswith("_finished") and is_last else "not finished"


def _wall_seconds(lines: Sequence[Mapping[str, Any]]) -> float:
    times: dict[int, list[float]] = {}
    for line in lines:
        step_seconds = line.get("metrics", {}).get("time/step_s") or 0.0
        times.setdefault(line["attempt"], []).extend([line["time"] - step_seconds, line["time"]])
    return sum(max(values) - min(values) for values in times.values())
