"""The disk fills, turns read-only or vanishes: errors name the file, the last good state remains, the run continues.

The full disk is real: a small tmpfs, mounted if allowed.
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

import orchestrator.run.checkpoints
import orchestrator.run.storage
from orchestrator.errors import StorageError
from orchestrator.run.checkpoints import Checkpoints
from orchestrator.run.experience_log import num_committed
from orchestrator.types import State
from orchestrator.watching.telemetry import Telemetry, read_lines
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
    "a file's sync": (orchestrator.run.storage, "sync_file", lambda path: path.name == "weights.txt", r"weights\.txt"),
    "the rename": (Path, "rename", lambda path: True, "step-000004"),
    "the check": (orchestrator.run.checkpoints, "sha256", lambda path: "step-000004" in path.parts, r"step-000004/\S+"),
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


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EROFS, errno.EACCES, errno.ENOTEMPTY], ids=errno.errorcode.get)
@pytest.mark.parametrize("owner_and_name", [(Path, "unlink"), (shutil, "rmtree")], ids=["the marker", "the folder"])
async def test_an_old_checkpoint_that_cannot_be_removed_is_reported_once_and_the_run_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    owner_and_name: tuple[Any, str],
    number: int,
) -> None:
    checkpoints, learner = checkpoints_in(tmp_path / "checkpoints")
    for step in (1, 2):
        await save(checkpoints, learner, step)
    with monkeypatch.context() as patch:
        fails_on(patch, *owner_and_name, number, lambda path: "step-000001" in str(path))
        for step in (3, 4):
            await save(checkpoints, learner, step)
        assert [record.message for record in caplog.records if "can't be removed" in record.message] == [
            f"{tmp_path}/checkpoints/step-000001 can't be removed ({os.strerror(number)}); it is left there."
        ]
        assert await checkpoints_in(tmp_path / "checkpoints")[0].restore() == State(4, 0.1)
    await save(checkpoints, learner, 5)
    assert names(tmp_path / "checkpoints") == ["step-000004", "step-000005"]


async def test_what_bears_another_name_than_ours_is_never_touched(tmp_path: Path) -> None:
    checkpoints, learner = checkpoints_in(tmp_path / "checkpoints")
    await save(checkpoints, learner, 1)
    copies = ["step-000001-best", "step-000001.bak", "step-1", "my step-000001", ".step-000001.mine.tmp"]
    for name in copies:
        shutil.copytree(tmp_path / "checkpoints" / "step-000001", tmp_path / "checkpoints" / name)
    for step in (2, 3, 4):
        await save(checkpoints, learner, step)
    assert names(tmp_path / "checkpoints") == sorted([*copies, "step-000003", "step-000004"])
    assert await checkpoints_in(tmp_path / "checkpoints")[0].restore() == State(4, 0.1)
    assert names(tmp_path / "checkpoints") == sorted([*copies, "step-000003", "step-000004"])
    with experience_log(tmp_path / "log") as log:
        (tmp_path / "log" / "step-000000").mkdir()
        for name in ("shard-0000 (copy).parquet", "shard-0000.parquet.bak", "notes.txt"):
            (tmp_path / "log" / "step-000000" / name).touch()
        (tmp_path / "log" / "step-000000" / "shard-0007.parquet").touch()
        await log.commit(State(0, 0.1), [scored_shard(0, 0)])
    assert names(tmp_path / "log" / "step-000000") == [
        "manifest.json",
        "notes.txt",
        "shard-0000 (copy).parquet",
        "shard-0000.parquet",
        "shard-0000.parquet.bak",
    ]


async def test_names_in_manifests_lead_nowhere_else(tmp_path: Path) -> None:
    """The manifest of a copied or downloaded run is untrusted."""
    checkpoints, learner = checkpoints_in(tmp_path / "checkpoints")
    await save(checkpoints, learner, 1)
    manifest = tmp_path / "checkpoints" / "step-000001" / "manifest.json"
    secret = tmp_path / "secret"
    secret.write_text("s")
    entry = {"num_bytes": 1, "sha256": orchestrator.run.storage.sha256(secret)}
    entries = orchestrator.run.storage.read_sealed(manifest)
    for name in (str(secret), "../../secret", "policy/../../../secret", "./state.json", "", "a\0b"):
        orchestrator.run.storage.write_sealed(manifest, {**entries, name: entry})
        with pytest.raises(StorageError, match="which is not inside it"):
            await checkpoints_in(tmp_path / "checkpoints")[0].restore()
    with experience_log(tmp_path / "log") as log:
        await log.commit(State(0, 0.1), [scored_shard(0, 0)])
        file = tmp_path / "log" / "step-000000" / "manifest.json"
        content = orchestrator.run.storage.read_sealed(file)
        content["shards"][0]["file"] = "../../secret"
        orchestrator.run.storage.write_sealed(file, content)
        with pytest.raises(StorageError, match="which is not inside it"):
            await log.load(0)


async def test_a_lost_step_is_sampled_again_and_the_steps_after_it_are_set_aside(tmp_path: Path) -> None:
    with experience_log(tmp_path / "log") as log:
        for step in range(4):
            await log.commit(State(step, 0.1), [scored_shard(step, 0)])
        shutil.rmtree(tmp_path / "log" / "step-000001")
        assert log.set_aside_after(1) == [2, 3]
        assert [log.holds(step) for step in range(4)] == [True, False, False, False]
        (aside,) = (tmp_path / "log" / "set-aside").iterdir()
        assert names(aside) == ["step-000002", "step-000003"]
        for step in (1, 2, 3):
            await log.commit(State(step, 0.1), [scored_shard(step, 0)])
        assert log.set_aside_after(2) == log.set_aside_after(4) == ()
        assert num_committed(tmp_path / "log") == 4


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
            owner, name = (Path, "mkdir") if file.startswith("step") else (orchestrator.run.storage, "sync_file")
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
    """Fills the remaining space. Returns the name of the file."""
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
