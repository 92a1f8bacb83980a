"""What a report shows of stages without rollouts of their own: trainings, evaluations, and scored samples."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from jobs.report.data import Extremes, Sample, extremes, read_config, read_table
from jobs.stages.evaluate import RESULT_FILE, Evaluate
from jobs.stages.sample import SAMPLES
from jobs.stages.score import SCORES
from jobs.stages.table import STAGES, named_kinds
from orchestrator.errors import StorageError
from orchestrator.run.folder import stage_place
from orchestrator.run.lineage import read_lineage
from orchestrator.run.storage import read_json
from orchestrator.watching.telemetry import METRICS_FILE, read_lines

_OF_EVERY_STEP = ("time/", "memory/", "tokens/", "telemetry/")
_NUM_REPLIES = 12


@dataclass(frozen=True)
class Training:
    """A stage that learned without rollouts.

    Args:
        steps: its own metrics by optimizer step, as ROLE/NAME.
        held_out: what it measured at its end.
    """

    stage: str
    steps: Mapping[int, Mapping[str, float]]
    held_out: Mapping[str, float]

    @property
    def names(self) -> Sequence[str]:
        return list(dict.fromkeys(name for metrics in self.steps.values() for name in metrics))

    def ends(self, name: str) -> tuple[float, float]:
        """Means of a metric over the first and the last tenth of the steps."""
        values = [metrics[name] for _, metrics in sorted(self.steps.items()) if name in metrics]
        count = ceil(len(values) / 10)
        return statistics.fmean(values[:count]), statistics.fmean(values[-count:])


@dataclass(frozen=True)
class Reply:
    """A held-out prompt with the reply of the evaluated policy, and of the model beside it. None: it had no other."""

    prompt_text: str
    policy: str
    against: str | None


@dataclass(frozen=True)
class Measured:
    """The result of a stage `evaluate`. `unmet`: the requirements that it does not meet."""

    stage: str
    against: str
    metrics: Mapping[str, float]
    unmet: Sequence[str]
    replies: Sequence[Reply]


@dataclass(frozen=True)
class Stages:
    """Args:
    scored: extremes of the newest samples that a stage `score` scored.
    notes: what could not be read.
    """

    trainings: Sequence[Training]
    measured: Sequence[Measured]
    scored: Extremes
    notes: Sequence[str]


def read_stages(folder: Path) -> Stages:
    """Reads a run folder. Raises StorageError: metrics.jsonl is damaged before its last line."""
    notes: list[str] = []
    _, config = read_config(folder / "config.yaml", [])
    kinds = named_kinds(config.get("stages"))
    return Stages(
        list(_trainings(read_lines(folder / METRICS_FILE), kinds)),
        list(_measured(folder, kinds, notes)),
        extremes(_scored(folder, notes)),
        notes,
    )


def _trainings(lines: Sequence[Mapping[str, Any]], kinds: Mapping[str, str]) -> Iterator[Training]:
    for stage, kind in kinds.items():
        if kind in STAGES and STAGES[kind].has_log:
            continue
        own = [line for line in lines if line["stage"] == stage]
        steps = {line["step"]: _numbers(line) for line in own if line["kind"] == "step"}
        held_out = {
            name: value for line in own if line["kind"] == "evaluation" for name, value in _numbers(line).items()
        }
        if steps:
            yield Training(stage, steps, held_out)


def _numbers(line: Mapping[str, Any]) -> Mapping[str, float]:
    return {
        name: value
        for name, value in line["metrics"].items()
        if value is not None and not name.startswith(_OF_EVERY_STEP)
    }


def _measured(folder: Path, kinds: Mapping[str, str], notes: list[str]) -> Iterator[Measured]:
    for place, stage in _places(folder, kinds, Evaluate.kind):
        path = place / "evaluate"
        if not (path / RESULT_FILE).exists():
            continue
        try:
            result = read_json(path / RESULT_FILE)
            found = Measured(stage, result["against"], result["metrics"], result["unmet"], _replies(path, notes))
        except (KeyError, TypeError, StorageError) as error:
            notes.append(f"{(path / RESULT_FILE).relative_to(folder)} can't be read ({type(error).__name__}).")
        else:
            yield found


def _replies(path: Path, notes: list[str]) -> Sequence[Reply]:
    """To the first prompts by id, so that examples are not hand-picked."""
    columns = ["prompt_id", "prompt_text", "response_text"]
    policy, against = (
        read_table(file, columns, path.parent, notes) if file.exists() else []
        for file in (path / "policy.parquet", path / "against.parquet")
    )
    other = {row["prompt_id"]: row["response_text"] for row in against}
    chosen = sorted(policy, key=lambda row: str(row["prompt_id"]))[:_NUM_REPLIES]
    return [Reply(row["prompt_text"], row["response_text"], other.get(row["prompt_id"])) for row in chosen]


def _scored(folder: Path, notes: list[str]) -> Iterator[Sample]:
    """The samples of the newest scores, which have the same order."""
    try:
        made = read_lineage(folder)
    except StorageError as error:
        notes.append(str(error))
        return
    for scores in [entry for entry in made if entry.kind == SCORES][-1:]:
        own = [entry.path for entry in made if entry.kind == SAMPLES and entry.stage == scores.stage]
        samples = folder / scores.reads.get(SAMPLES, (own or [scores.path])[0])
        rows = read_table(samples, ["prompt_text", "response_text"], folder, notes)
        found = read_table(folder / scores.path, ["reward"], folder, notes)
        if len(rows) == len(found):
            for number, (row, score) in enumerate(zip(rows, found, strict=True)):
                if score["reward"] is not None:
                    yield Sample(number, row["prompt_text"], row["response_text"], score["reward"])


def _places(folder: Path, kinds: Mapping[str, str], kind: str) -> Iterator[tuple[Path, str]]:
    for name, other in kinds.items():
        if other == kind:
            yield stage_place(folder, "" if name == kind else name), name
