from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from actors.training.train_run import Progress, Workers
from actors.training.trainer import Training
from jobs.stages.work import training as module
from jobs.stages.work.training import Report, train
from orchestrator.config.sections import DeadlinesConfig
from orchestrator.config.trainings import RewardModelConfig
from orchestrator.watching.telemetry import Telemetry, read_lines

STEPS = 40
WORKERS = Workers("reward_model", 1, 1, 0.0, 1.0, 1.0, 1)


class Lost(Exception):
    """The driver ends here."""


class Run:
    """A training whose steps are made as fast as they are asked for; the driver is lost at `lost_at`."""

    def __init__(self, lost_at: int | None, *_: Any, on_start: Callable[[int], None]) -> None:
        self._lost_at, self._step, self._on_start = lost_at, 0, on_start

    async def next_step(self, timeout_s: float) -> Progress:
        if self._step == self._lost_at:
            raise Lost
        if self._step == 10:
            self._on_start(5)
        self._step += 1
        return {"loss": 1.0 / self._step, "seconds": 0.5, "tokens": 100.0}

    async def result(self, timeout_s: float) -> str:
        return "made"


def drive(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, lost_at: int | None = None, identity: object = "x"
) -> tuple[Sequence[Progress], list[str]]:
    said: list[str] = []
    monkeypatch.setattr(module, "TrainRun", partial(Run, lost_at))
    monkeypatch.setattr(module.ray, "put", lambda data: data)
    with Telemetry(folder, "run", 1, stage="reward_model") as telemetry:
        report = Report(telemetry, said.append, "reward_model", STEPS, ("loss",), lambda steps: f"{len(steps)} steps")
        training: Training[Any] = Training(
            role="reward_model",
            make=lambda data, group: None,  # type: ignore[arg-type,return-value]
            passes=RewardModelConfig(),
            seed=0,
            work=folder / "work",
            unexpected_errors=1,
            threads=1,
            timeout_s=1.0,
        )
        steps, made = asyncio.run(train(training, "data", WORKERS, DeadlinesConfig(), report, identity=identity))
    assert made == "made"
    return steps, said


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["metrics"]["reward_model/loss"]) for line in read_lines(folder / "metrics.jsonl")]


EXPECTED = [(step, 1.0 / (step + 1)) for step in range(STEPS)]


def test_every_step_is_recorded_and_every_twentieth_part_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, said = drive(tmp_path, monkeypatch)
    assert len(steps) == STEPS and losses(tmp_path) == EXPECTED
    assert said[0] == "reward model 2/40  2 steps  200 tok/s  19 s left"
    assert said[-1] == "reward model 40/40  2 steps  200 tok/s  0 s left"
    assert [line for line in said if "continues" in line] == ["reward model: continues after step 5 of 40"]
    assert len(said) == 21
    (event,) = read_lines(tmp_path / "events.jsonl")
    assert (event["kind"], event["step"]) == ("training_continued", 5)


def test_steps_that_an_earlier_driver_reported_are_not_reported_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Lost):
        drive(tmp_path, monkeypatch, lost_at=23)
    assert len(losses(tmp_path)) == 23
    times = [line["time"] for line in read_lines(tmp_path / "metrics.jsonl")]
    steps, said = drive(tmp_path, monkeypatch)
    assert len(steps) == STEPS and losses(tmp_path) == EXPECTED
    assert [line["time"] for line in read_lines(tmp_path / "metrics.jsonl")][:23] == times
    assert next(line for line in said if "/40" in line).startswith("reward model 24/40")


def test_a_training_of_something_else_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Lost):
        drive(tmp_path, monkeypatch, lost_at=23)
    (tmp_path / "work" / "checkpoints" / "step-000025").mkdir()
    with pytest.raises(Lost):
        drive(tmp_path, monkeypatch, lost_at=3, identity="y")
    assert len(losses(tmp_path)) == 3
    assert list((tmp_path / "work" / "checkpoints").iterdir()) == []
