"""The trainer with an in-memory learner, killed at every point where it writes or learns."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.learning.distributed import Group
from actors.learning.learner import Update
from actors.training import checkpoints, work
from actors.training.checkpoints import TrainingCheckpoints
from actors.training.trainer import Trainer, Training
from actors.training.work import PROGRESS_FILE, WorkFolder, open_work
from orchestrator.errors import Superseded

NUM_RECORDS, EPOCHS, BATCH, EVERY = 7, 2, 2, 3
STEPS = EPOCHS * 4


class Killed(BaseException):
    """Ends a try anywhere, like SIGKILL."""


@dataclass
class Deaths:
    """Counts the points where a try can be killed, and kills at one of them."""

    at: int | None = None
    places: int = 0

    def here(self) -> None:
        self.places += 1
        if self.places - 1 == self.at:
            raise Killed


@dataclass(frozen=True)
class Passes:
    epochs: int = EPOCHS
    records_per_batch: int = BATCH
    micro_batch_tokens: int = 100
    checkpoint_every_steps: int = EVERY


class Rows:
    def pack(self, rows: Sequence[int], device: torch.device) -> list[int]:
        return list(rows)


class Data:
    num_records, rows = NUM_RECORDS, Rows()

    def micro_batches(self, records: Sequence[int], group: Group, micro_batch_tokens: int) -> list[tuple[int, ...]]:
        return [(record,) for record in records]

    def num_tokens(self, records: Sequence[int]) -> int:
        return 10 * len(records)


@dataclass
class Learner:
    """Its weights are the list of everything it learned."""

    deaths: Deaths
    weights: list[Any] = field(default_factory=list)
    device: Any = None

    def update(self, micros: Sequence[Any], objective: Any, *, count: float, what: str) -> Update:
        self.deaths.here()
        self.weights.append([micros, count])
        return Update({"loss": float(len(self.weights))}, {}, 0.0, 0.0)

    def save(self, folder: Path) -> None:
        self.deaths.here()
        text = json.dumps(self.weights)
        (folder / "weights.json").write_text(text[:5])
        self.deaths.here()
        (folder / "weights.json").write_text(text)

    def load(self, folder: Path) -> None:
        self.weights = json.loads((folder / "weights.json").read_text())


class Task:
    def __init__(self, deaths: Deaths, data: Data, group: Group) -> None:
        self.learner, self.data, self._deaths = Learner(deaths), data, deaths

    def objective(self, records: Sequence[int]) -> Any:
        return None  # the in-memory learner calls no objective

    def count(self, records: Sequence[int]) -> float:
        return float(len(records))

    def metrics(self, update: Update) -> Mapping[str, float]:
        return update.means

    def finish(self) -> list[Any]:
        self._deaths.here()
        return self.learner.weights


def try_once(folder: Path, deaths: Deaths, passes: Passes = Passes(), writer: str = "a") -> list[Any]:
    training: Training[Any] = Training(
        role="reward_model",
        make=partial(Task, deaths),
        passes=passes,
        seed=1,
        work=folder,
        unexpected_errors=1,
        threads=1,
        timeout_s=1.0,
    )
    claimed = WorkFolder(folder, writer)
    claimed.claim()
    made: list[Any] = Trainer(training, Data(), Group(), claimed).run()
    return made


def reported(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / PROGRESS_FILE).read_text().splitlines()]


@pytest.fixture
def dying(monkeypatch: pytest.MonkeyPatch) -> Callable[[Deaths], None]:
    """Kills a try before and after each write of the training."""

    def install(deaths: Deaths) -> None:
        def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                deaths.here()
                result = real(*arguments, **named)
                deaths.here()
                return result

            return call

        for module, name in ((work, "append_line"), (checkpoints, "sync_tree"), (checkpoints, "sync_folder")):
            monkeypatch.setattr(module, name, wrapped(getattr(module, name)))
        monkeypatch.setattr(Path, "rename", wrapped(Path.rename))

    return install


def test_a_training_that_is_killed_twice_anywhere_ends_as_one_that_is_not(
    tmp_path: Path, dying: Callable[[Deaths], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = Deaths()
    open_work(tmp_path / "quiet", "x")
    with monkeypatch.context():
        dying(quiet)
        expected = try_once(tmp_path / "quiet", quiet)
    monkeypatch.undo()
    assert len(expected) == STEPS and quiet.places > 3 * STEPS
    for place in range(quiet.places):
        folder = tmp_path / str(place)
        open_work(folder, "x")
        for writer, deaths in (("a", Deaths(at=place)), ("b", Deaths(at=place % 5))):
            dying(deaths)
            with pytest.raises(Killed):
                try_once(folder, deaths, writer=writer)
            monkeypatch.undo()
        assert try_once(folder, Deaths(), writer="c") == expected, f"killed at place {place}"
        losses = {line["step"]: line["metrics"]["loss"] for line in reported(folder) if "step" in line}
        assert losses == {step: step + 1.0 for step in range(STEPS)}


def test_what_follows_the_last_checkpoint_is_learned_again_and_nothing_else(tmp_path: Path) -> None:
    open_work(tmp_path / "work", "x")
    with pytest.raises(Killed):
        try_once(tmp_path / "work", Deaths(at=EVERY + 4))  # two places in each save
    assert [path.name for path in (tmp_path / "work" / "checkpoints").iterdir()] == [f"step-{EVERY:06d}"]
    try_once(tmp_path / "work", Deaths(), writer="b")
    lines = reported(tmp_path / "work")
    again = lines[lines.index({"continues_after": EVERY}) + 1 :]
    assert [line["step"] for line in again] == list(range(EVERY, STEPS))


def test_only_the_newest_checkpoint_is_kept_and_what_a_killed_save_left_is_removed(tmp_path: Path) -> None:
    open_work(tmp_path / "work", "x")
    folder = tmp_path / "work" / "checkpoints"
    (folder / ".step-000003.dead.tmp").mkdir()
    try_once(tmp_path / "work", Deaths())
    assert [path.name for path in folder.iterdir()] == [f"step-{STEPS // EVERY * EVERY:06d}"]


def test_without_checkpoints_a_training_starts_again_and_ends_the_same(tmp_path: Path) -> None:
    passes = Passes(checkpoint_every_steps=0)
    for name in ("quiet", "killed"):
        open_work(tmp_path / name, "x")
    expected = try_once(tmp_path / "quiet", Deaths(), passes)
    with pytest.raises(Killed):
        try_once(tmp_path / "killed", Deaths(at=5), passes)
    assert try_once(tmp_path / "killed", Deaths(), passes, writer="b") == expected
    assert list((tmp_path / "killed" / "checkpoints").iterdir()) == []


def test_a_try_that_was_superseded_neither_saves_nor_finishes(tmp_path: Path) -> None:
    open_work(tmp_path / "work", "x")
    old, new = WorkFolder(tmp_path / "work", "old"), WorkFolder(tmp_path / "work", "new")
    old.claim()
    learner = Learner(Deaths())
    saved = TrainingCheckpoints(old, learner, Group())
    saved.save(1)
    new.claim()
    with pytest.raises(Superseded):
        saved.save(2)
    assert TrainingCheckpoints(new, learner, Group()).restore() == 1


def test_every_epoch_has_an_order_of_its_own_that_follows_from_the_seed(tmp_path: Path) -> None:
    open_work(tmp_path / "work", "x")
    learned = try_once(tmp_path / "work", Deaths())
    epochs = [
        list(itertools.chain.from_iterable(row for micros, _ in part for row in micros))
        for part in (learned[:4], learned[4:])
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(NUM_RECORDS))
    assert epochs[0] != epochs[1]
    assert [count for _, count in learned] == [2.0, 2.0, 2.0, 1.0] * EPOCHS
