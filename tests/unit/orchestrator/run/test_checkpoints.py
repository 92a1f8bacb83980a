"""Checkpoints are complete or absent whenever the process dies; old ones are removed; errors name damage."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import orchestrator.run.checkpoints
from orchestrator.errors import StorageError
from orchestrator.run.checkpoints import MARKER, Checkpoints
from orchestrator.types import State
from tests.unit.orchestrator.fakes import Diary, FakeLearner


class Killed(Exception):
    """Simulates the end of the process: nothing runs after it."""


class World:
    """One run's checkpoints; a new World on the same folder is the next attempt."""

    def __init__(self, folder: Path, *, keep: int = 2, every_steps: int = 0) -> None:
        self.policy, self.critic = FakeLearner("policy", Diary()), FakeLearner("critic", Diary())
        learners = {"policy": self.policy, "critic": self.critic}
        self.folder = folder / "checkpoints"
        self.checkpoints = Checkpoints(self.folder, learners, every_steps=every_steps, last_step=10, keep=keep)

    async def save(self, step: int) -> None:
        self.policy.learned = self.critic.learned = list(range(step))
        await self.checkpoints.save(State(step, 0.1 * step))

    def names(self) -> list[str]:
        return [path.name for path in self.checkpoints.complete()]


def dies_in(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, when: Callable[..., bool]) -> None:
    original = getattr(owner, name)

    def dying(*args: Any, **kwargs: Any) -> Any:
        if when(*args):
            raise Killed(name)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, dying)


def _path_is(name: str) -> Callable[..., bool]:
    return lambda path, *rest: path.name == name


STAGES: dict[str, tuple[Any, str, Callable[..., bool]]] = {
    "before a learner's folder is made": (Path, "mkdir", _path_is("critic")),
    "before the policy is saved": (FakeLearner, "save", lambda learner, folder: learner.name == "policy"),
    "before the critic is saved": (FakeLearner, "save", lambda learner, folder: learner.name == "critic"),
    "before the state is written": (orchestrator.run.checkpoints, "write_json", _path_is("state.json")),
    "before files are summed": (orchestrator.run.checkpoints, "sha256", lambda path: True),
    "before the manifest is written": (orchestrator.run.checkpoints, "write_sealed", _path_is("manifest.json")),
    "before files are synced": (orchestrator.run.checkpoints, "sync_tree", lambda path: True),
    "before the rename": (Path, "rename", lambda path, target: target.name == "step-000004"),
    "before it is verified": (orchestrator.run.checkpoints, "verify", lambda folder: True),
    "before the marker": (Path, "touch", _path_is(MARKER)),
}


@pytest.mark.parametrize("stage", STAGES)
async def test_killed_at_any_stage_of_a_save_the_last_good_one_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    await World(tmp_path).save(2)
    with monkeypatch.context() as patch:
        dies_in(patch, *STAGES[stage])
        with pytest.raises(Killed):
            await World(tmp_path).save(4)
    after = World(tmp_path)
    assert await after.checkpoints.restore() == State(2, 0.2)
    assert after.policy.learned == after.critic.learned == [0, 1]
    await after.save(4)
    again = World(tmp_path)
    assert await again.checkpoints.restore() == State(4, 0.4)
    assert again.critic.learned == [0, 1, 2, 3]
    assert not list(after.folder.glob(".*")), "an unfinished save was left behind"


async def test_killed_after_the_marker_the_new_one_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await World(tmp_path).save(2)
    with monkeypatch.context() as patch:
        dies_in(patch, orchestrator.run.checkpoints, "sync_file", _path_is(MARKER))
        with pytest.raises(Killed):
            await World(tmp_path).save(4)
    assert await World(tmp_path).checkpoints.restore() == State(4, 0.4)


async def test_without_a_checkpoint_there_is_nothing_to_restore(tmp_path: Path) -> None:
    assert await World(tmp_path).checkpoints.restore() is None


@pytest.mark.parametrize("keep", [1, 2, 3])
async def test_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    world = World(tmp_path, keep=keep)
    for step in (1, 2, 3, 4):
        await world.save(step)
    assert world.names() == [f"step-{step:06d}" for step in (1, 2, 3, 4)][-keep:]


async def test_a_save_that_dies_retires_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, keep=1)
    await world.save(1)
    dies_in(monkeypatch, Path, "touch", _path_is(MARKER))
    with pytest.raises(Killed):
        await world.save(2)
    assert world.names() == ["step-000001"]


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda path: path.write_bytes(b"1" + path.read_bytes()[1:]), "does not match its checksum"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"has 2 bytes instead of 3"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
async def test_a_file_that_was_altered_is_named(tmp_path: Path, damage: Callable[[Path], object], problem: str) -> None:
    world = World(tmp_path)
    await world.save(2)
    damage(world.folder / "step-000002" / "critic" / "weights.txt")
    with pytest.raises(StorageError, match=rf"step-000002/critic/weights\.txt {problem}"):
        await World(tmp_path).checkpoints.restore()


async def test_a_damaged_newest_checkpoint_is_passed_over_for_an_older_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(tmp_path)
    for step in (2, 4):
        await world.save(step)
    (world.folder / "step-000004" / "policy" / "weights.txt").write_text("0,1,2,9")
    after = World(tmp_path, every_steps=2)
    assert await after.checkpoints.restore() == State(2, 0.2)
    assert after.policy.learned == after.critic.learned == [0, 1]
    assert "step-000004/policy/weights.txt does not match its checksum" in caplog.text
    assert "step-000002 and its log" in caplog.text
    assert after.names() == ["step-000002"]
    after.policy.learned = after.critic.learned = [0, 1, 2, 3]
    await after.checkpoints.save_if_due(State(4, 0.4))
    assert after.names() == ["step-000002", "step-000004"]
    assert await World(tmp_path).checkpoints.restore() == State(4, 0.4)


async def test_damaged_checkpoints_are_not_counted_among_those_that_are_kept(tmp_path: Path) -> None:
    world = World(tmp_path, keep=2)
    for step in (2, 4):
        await world.save(step)
    (world.folder / "step-000004" / "state.json").unlink()
    after = World(tmp_path, keep=2)
    await after.checkpoints.restore()
    await after.save(6)
    assert after.names() == ["step-000002", "step-000006"]
    assert sorted(path.name for path in after.folder.iterdir()) == after.names()


async def test_with_every_checkpoint_damaged_the_error_names_them_and_the_way_out(tmp_path: Path) -> None:
    world = World(tmp_path)
    for step in (2, 4):
        await world.save(step)
        (world.folder / f"step-{step:06d}" / "manifest.json").write_text("{}")
    with pytest.raises(StorageError) as caught:
        await World(tmp_path).checkpoints.restore()
    for text in ("step-000002/manifest.json is damaged", "step-000004/manifest.json", "delete", "step 0 of its log"):
        assert text in str(caught.value)


async def test_a_checkpoint_that_differs_once_it_is_on_disk_retires_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path, keep=1)
    await world.save(2)
    rename = Path.rename

    def losing_a_byte(path: Path, target: Path) -> Path:
        (path / "policy" / "weights.txt").write_text("0,1,2")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", losing_a_byte)
        with pytest.raises(StorageError, match=r"step-000004/policy/weights\.txt has 5 bytes instead of 7"):
            await world.save(4)
    assert [path.name for path in world.folder.iterdir()] == ["step-000002"]
    assert await World(tmp_path).checkpoints.restore() == State(2, 0.2)


async def test_saves_are_due_every_so_many_steps_and_after_the_last(tmp_path: Path) -> None:
    for every_steps, expected in ((0, [10]), (4, [4, 8, 10])):
        world = World(tmp_path / str(every_steps), keep=10, every_steps=every_steps)
        for step in range(1, 11):
            await world.checkpoints.save_if_due(State(step, 0.0))
        assert world.names() == [f"step-{step:06d}" for step in expected]


async def test_a_save_that_is_cut_short_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path)
    await world.save(2)
    begun = asyncio.Event()

    async def slow(learner: FakeLearner, folder: Path) -> None:
        (folder / "weights").write_bytes(b"half")
        begun.set()
        await asyncio.sleep(60)

    monkeypatch.setattr(FakeLearner, "save", slow)
    saving = asyncio.create_task(world.save(4))
    await begun.wait()
    saving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await saving
    assert [path.name for path in world.folder.iterdir()] == ["step-000002"]


async def test_what_a_killed_save_left_goes_when_the_run_goes_on(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.save(2)
    half = world.folder / ".step-000004.abcd1234.tmp"
    half.mkdir()
    (half / "weights").write_bytes(b"half")
    assert await World(tmp_path).checkpoints.restore() == State(2, 0.2)
    assert [path.name for path in world.folder.iterdir()] == ["step-000002"]
