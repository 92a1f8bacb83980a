"""The disk fills, turns read-only or vanishes: the error names the file, the last good state stands, the run goes on.

The full disk is a real one: a small tmpfs, mounted where that is allowed.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import orchestrator.checkpoints
import orchestrator.storage
from orchestrator.checkpoints import Checkpoints
from orchestrator.errors import StorageError
from orchestrator.experience_log import num_committed
from orchestrator.telemetry import Telemetry, read_lines
from orchestrator.types import State
from tests.chaos.recorded import experience_log, scored_shard
from tests.unit.orchestrator.fakes import Diary, FakeLearner

DISK_BYTES = 1 << 20
ERRORS = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO)


class HeavyLearner(FakeLearner):
    """Its checkpoint takes a tenth of the small disk."""

    async def save(self, folder: Path) -> None:
        await super().save(folder)
        (folder / "optimizer.bin").write_bytes(os.urandom(DISK_BYTES // 10))


def checkpoints_in(folder: Path, learner: type[FakeLearner] = FakeLearner) -> tuple[Checkpoints, FakeLearner]:
    policy = learner("policy", Diary())
    return Checkpoints(folder, {"policy": policy}, every_steps=1, last_step=9, keep=2), policy


async def save(checkpoints: Checkpoints, learner: FakeLearner, step: int) -> None:
    learner.learned = list(range(step))
    await checkpoints.save(State(step, 0.1))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fails_on(patch: pytest.MonkeyPatch, owner: Any, name: str, number: int, when: Callable[[Path], bool]) -> None:
    original = getattr(owner, name)

    def failing(path: Any, *args: Any, **kwargs: Any) -> Any:
        if when(Path(path)):
            raise OSError(number, os.strerror(number), str(path))
        return original(path, *args, **kwargs)

    patch.setattr(owner, name, failing)


SAVING: dict[str, tuple[Any, str, Callable[[Path], bool], str]] = {
    "the temporary folder": (
        Path,
        "mkdir",
        lambda path: path.name.startswith(".step-000004."),
        r"\.step-000004\.\w+\.tmp",
    ),
    "a role's folder": (Path, "mkdir", lambda path: path.name == "policy", "policy"),
    "a role's file": (Path, "write_text", lambda path: path.name == "weights.txt", r"weights\.txt"),
    "the state": (Path, "write_text", lambda path: ".state.json." in path.name, r"state\.json"),
    "the manifest": (Path, "write_text", lambda path: ".manifest.json." in path.name, r"manifest\.json"),
    "a file's sync": (orchestrator.storage, "sync_file", lambda path: path.name == "weights.txt", r"weights\.txt"),
    "the rename": (Path, "rename", lambda path: True, "step-000004"),
    "the check": (orchestrator.checkpoints, "sha256", lambda path: "step-000004" in path.parts, r"step-000004/\S+"),
    "the marker": (Path, "touch", lambda path: True, "COMPLETE"),
}


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("what", SAVING)
async def test_a_save_that_fails_names_the_file_and_leaves_the_last_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, number: int
) -> None:
    folder = tmp_path / "checkpoints"
    checkpoints, learner = checkpoints_in(folder)
    await save(checkpoints, learner, 2)
    owner, name, when, file = SAVING[what]
    with monkeypatch.context() as patch:
        fails_on(patch, owner, name, number, when)
        with pytest.raises(StorageError, match=rf"{file}.* can't be (written|read) \({os.strerror(number)}\)"):
            await save(checkpoints, learner, 4)
    assert names(folder) == ["step-000002"]
    assert await checkpoints.restore() == State(2, 0.1)
    await save(checkpoints, learner, 4)
    assert await checkpoints_in(folder)[0].restore() == State(4, 0.1)


async def test_an_old_checkpoint_that_cannot_be_removed_is_named_and_the_new_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, learner = checkpoints_in(tmp_path / "checkpoints")
    for step in (1, 2):
        await save(checkpoints, learner, step)
    fails_on(monkeypatch, Path, "unlink", errno.EROFS, lambda path: "step-000001" in str(path))
    with pytest.raises(StorageError, match="step-000001/COMPLETE can't be written"):
        await save(checkpoints, learner, 3)
    assert await checkpoints_in(tmp_path / "checkpoints")[0].restore() == State(3, 0.1)


async def test_folders_that_vanish_are_named(tmp_path: Path) -> None:
    checkpoints, learner = checkpoints_in(tmp_path / "checkpoints")
    with experience_log(tmp_path / "log") as log:
        shutil.rmtree(tmp_path / "checkpoints")
        shutil.rmtree(tmp_path / "log")
        with pytest.raises(StorageError, match=r"\.step-000002\.\w+\.tmp can't be written .* put its folder back"):
            await save(checkpoints, learner, 2)
        with pytest.raises(StorageError, match="log/step-000000 can't be written"):
            await log.commit(State(0, 0.1), [scored_shard(0, 0)])
        assert not log.holds(0)
        with pytest.raises(StorageError, match=r"step-000000/manifest\.json can't be read"):
            await log.load(0)


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("file", ["step-000001", "shard-0001.parquet", "manifest.json"])
async def test_a_commit_that_fails_names_the_file_and_is_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, number: int
) -> None:
    shards = [scored_shard(1, index) for index in range(2)]
    with experience_log(tmp_path / "log") as log:
        await log.commit(State(0, 0.1), [scored_shard(0, 0)])
        with monkeypatch.context() as patch:
            owner, name = (Path, "mkdir") if file.startswith("step") else (orchestrator.storage, "sync_file")
            fails_on(patch, owner, name, number, lambda path: file in path.name)
            with pytest.raises(StorageError, match=rf"{file} can't be written \({os.strerror(number)}\)"):
                await log.commit(State(1, 0.1), shards)
        assert num_committed(tmp_path / "log") == 1
        assert not list(tmp_path.rglob("*.tmp"))
        committed = await log.commit(State(1, 0.1), shards)
        assert (await log.load(1)).metrics == committed.metrics


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk can't be mounted here: that needs root and the right to mount")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path) -> Path:
    """Takes all the room that is left; the file's name is returned."""
    path = disk / "filler"
    with path.open("wb", buffering=0) as stream, pytest.raises(OSError, match="No space left on device"):
        while True:
            stream.write(b"x" * 4096)
    return path


async def test_on_a_full_disk_nothing_is_half_and_the_run_goes_on_once_there_is_room(small_disk: Path) -> None:
    checkpoints, learner = checkpoints_in(small_disk / "checkpoints", HeavyLearner)
    with experience_log(small_disk / "log") as log:
        for step in range(2):
            await log.commit(State(step, 0.1), [scored_shard(step, index) for index in range(2)])
            await save(checkpoints, learner, step + 1)
        shards = [scored_shard(2, index) for index in range(2)]
        filler = fill(small_disk)
        with pytest.raises(StorageError, match=r"step-000002\S* can't be written \(.*No space left on device"):
            await log.commit(State(2, 0.1), shards)
        with pytest.raises(StorageError, match=r"step-000003\S* can't be written \(.*No space left on device"):
            await save(checkpoints, learner, 3)
        assert num_committed(small_disk / "log") == 2
        assert names(small_disk / "checkpoints") == ["step-000001", "step-000002"]
        assert not list(small_disk.rglob("*.tmp"))
        again, restored = checkpoints_in(small_disk / "checkpoints", HeavyLearner)
        assert await again.restore() == State(2, 0.1)
        assert restored.learned == [0, 1]

        filler.unlink()
        committed = await log.commit(State(2, 0.1), shards)
        assert (await log.load(2)).metrics == committed.metrics
        await save(again, restored, 3)
        assert await checkpoints_in(small_disk / "checkpoints")[0].restore() == State(3, 0.1)
        assert names(small_disk / "checkpoints") == ["step-000002", "step-000003"]


@pytest.mark.parametrize("room", [4096 * pages for pages in (0, 1, 2, 3, 4, 5, 10, 20, 25, 40)])
async def test_wherever_the_disk_fills_up_during_a_save_the_last_good_one_stands(small_disk: Path, room: int) -> None:
    checkpoints, learner = checkpoints_in(small_disk / "checkpoints", HeavyLearner)
    await save(checkpoints, learner, 1)
    filler = fill(small_disk)
    os.truncate(filler, filler.stat().st_size - room)
    expected = ["step-000001", "step-000002"]
    if room < DISK_BYTES // 10:
        expected.pop()
        with pytest.raises(StorageError, match="step-000002"):
            await save(checkpoints, learner, 2)
    else:
        await save(checkpoints, learner, 2)
    assert names(small_disk / "checkpoints") == expected
    assert await checkpoints_in(small_disk / "checkpoints")[0].restore() == State(len(expected), 0.1)


def test_a_line_that_does_not_fit_leaves_no_half_of_it(small_disk: Path) -> None:
    with Telemetry(small_disk, "run-1", 1) as telemetry:
        telemetry.event("before")
        filler = fill(small_disk)
        with pytest.raises(StorageError, match=r"events\.jsonl can't be written \(No space left on device\)"):
            telemetry.event("too long", text="x" * 10_000)
        filler.unlink()
        telemetry.event("after")
    assert [event["kind"] for event in read_lines(small_disk / "events.jsonl")] == ["before", "after"]
