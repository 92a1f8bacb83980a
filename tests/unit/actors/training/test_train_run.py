from __future__ import annotations

import asyncio
import pickle
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import ControllerError, WorkerGroupError

from actors.training import train_run
from actors.training.train_run import TrainRun, Workers, failure
from actors.training.work import WorkFolder
from orchestrator.errors import CapacityError, DeadlineExceeded, RlhfError, RoleError, StorageError
from tests.deadlines import scaled


def test_a_failed_worker_is_named_with_its_cause() -> None:
    error = failure("reward_model", WorkerGroupError("both", {1: RuntimeError("trace\n  more\nout of memory")}))
    assert isinstance(error, RoleError)
    assert (error.role, error.rank) == ("reward_model", 1)
    assert "out of memory" in str(error)


def test_room_that_does_not_come_is_a_capacity_error() -> None:
    error = failure(
        "reward_model", ControllerError(RuntimeError("The worker group startup timed out after 5.0 seconds"))
    )
    assert isinstance(error, CapacityError)
    assert "reward_model.ranks" in str(error)


class _Trainer:
    """The parts of Ray Train's trainer that TrainRun uses; the test does its work."""

    def __init__(self) -> None:
        self.ended = threading.Event()

    def fit(self) -> Any:
        self.ended.wait(scaled(20.0))
        return SimpleNamespace(return_value=pickle.dumps("made"))


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Trainer]:
    found = _Trainer()
    monkeypatch.setattr(train_run, "_trainer", lambda *arguments: found)
    yield found
    found.ended.set()


WORKERS = Workers("reward_model", 1, 1, 0.0, 1.0, 1.0, 1)


def test_repeated_steps_are_returned_once_and_only_new_starts_are_told(tmp_path: Path, trainer: _Trainer) -> None:
    started: list[int] = []

    async def follow() -> list[float]:
        earlier = WorkFolder(tmp_path, "a")
        earlier.started(0)
        for step in (0, 1, 2):
            earlier.stepped(step, {"loss": step / 3})
        run = TrainRun({}, WORKERS, tmp_path, started.append)
        losses = [(await run.next_step(scaled(5.0)))["loss"] for _ in range(3)]
        assert started == []
        now = WorkFolder(tmp_path, "b")
        now.started(2)
        for step in (2, 3):
            now.stepped(step, {"loss": step / 3})
        losses.append((await run.next_step(scaled(5.0)))["loss"])
        assert started == [2]
        trainer.ended.set()
        assert await run.result(scaled(5.0)) == "made"
        return losses

    assert asyncio.run(follow()) == [0.0, 1 / 3, 2 / 3, 1.0]


def test_workers_that_report_nothing_miss_their_deadline(tmp_path: Path, trainer: _Trainer) -> None:
    async def follow() -> None:
        run = TrainRun({}, WORKERS, tmp_path, lambda step: None)
        with pytest.raises(DeadlineExceeded, match="no step was finished in 0.3 s"):
            await run.next_step(0.3)
        with pytest.raises(DeadlineExceeded, match="evaluate and save"):
            await run.result(0.3)

    asyncio.run(follow())


def test_a_training_that_ends_before_its_last_step_failed(tmp_path: Path, trainer: _Trainer) -> None:
    async def follow() -> None:
        run = TrainRun({}, WORKERS, tmp_path, lambda step: None)
        trainer.ended.set()
        with pytest.raises(RoleError, match="ended before its last step"):
            await run.next_step(scaled(5.0))

    asyncio.run(follow())


@pytest.mark.parametrize(
    ("failures", "raised"),
    [
        ([], None),
        ([RoleError("reward_model", 0, "train", "x")], None),
        ([RoleError("reward_model", 0, "train", "x")] * 2, RoleError),
        ([StorageError("full")], StorageError),
    ],
)
def test_errors_of_earlier_tries_end_the_training_when_they_would_come_again(
    tmp_path: Path, failures: list[RlhfError], raised: type[RlhfError] | None
) -> None:
    for error in failures:
        WorkFolder(tmp_path, "a").failed(error)
    with pytest.raises(raised) if raised else nullcontext():
        train_run._begin(WorkFolder(tmp_path, "b"), unexpected_errors=1)
