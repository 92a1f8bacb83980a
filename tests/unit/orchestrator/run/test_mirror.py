from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import ConfigError, StorageError, Superseded
from orchestrator.run.mirror import KEEP, Mirror, Mirroring
from orchestrator.run.storage import write_sealed
from tests.deadlines import scaled

FILES = {
    "config.yaml": "run: {}\n",
    "attempts/001": "",
    "log/step-000000/manifest.json": "{}",
    "log/step-000000/shard-0000.parquet": "samples",
    "checkpoints/step-000001/policy/weights.pt": "weights",
    "checkpoints/step-000001/COMPLETE": "",
    "metrics.jsonl": '{"step": 0}\n',
}
LEFT_OUT = {
    "heartbeat.json": "{}",
    "labels.db": "is written to",
    "labels.db-wal": "is written to",
    "checkpoints/.step-000002.ab12.tmp/policy/weights.pt": "half",
    "checkpoints/step-000003/policy/weights.pt": "not yet found to match",
}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write(tmp_path / "run", {**FILES, **LEFT_OUT})
    return tmp_path / "run"


@pytest.fixture
def mirror(tmp_path: Path) -> Mirror:
    return Mirror(str(tmp_path / "mirror"), "run-1")


def stored(tmp_path: Path, part: str) -> dict[str, Path]:
    return {path.name: path for path in (tmp_path / "mirror" / "run-1" / part).iterdir()}


def test_what_is_pulled_is_what_was_whole(run: Path, mirror: Mirror, tmp_path: Path) -> None:
    pushed = mirror.push(run, attempt=1)
    assert mirror.pull(tmp_path / "again") == pushed
    assert content(tmp_path / "again") == FILES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "mirror", "run"]


def test_another_run_has_another_mirror(run: Path, mirror: Mirror, tmp_path: Path) -> None:
    mirror.push(run, attempt=1)
    assert Mirror(str(tmp_path / "mirror"), "run-2").pull(tmp_path / "again") is None
    assert not (tmp_path / "again").exists()


def test_only_what_changed_is_sent(run: Path, mirror: Mirror, tmp_path: Path) -> None:
    mirror.push(run, attempt=1)
    before = {name: path.stat().st_mtime_ns for name, path in stored(tmp_path, "objects").items()}
    assert mirror.push(run, attempt=1) is None
    assert Mirror(str(tmp_path / "mirror"), "run-1").push(run, attempt=2) is None
    write(run, {"metrics.jsonl": '{"step": 0}\n{"step": 1}\n'})
    assert mirror.push(run, attempt=1) is not None
    after = {name: path.stat().st_mtime_ns for name, path in stored(tmp_path, "objects").items()}
    assert len(after.keys() - before.keys()) == 1
    assert before.items() <= after.items()


@pytest.mark.parametrize("cut_off", ["objects", "snapshots"])
def test_a_push_that_breaks_off_leaves_the_snapshot_before(
    run: Path, mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut_off: str
) -> None:
    first = mirror.push(run, attempt=1)
    write(run, {"metrics.jsonl": '{"step": 0}\n{"step": 1}\n'})
    whole: Callable[[str, bytes], None] = mirror._write

    def half(path: str, data: bytes) -> None:
        if f"/{cut_off}/" in path:
            whole(path, data[: len(data) // 2])
            raise OSError("the connection was reset")
        whole(path, data)

    monkeypatch.setattr(mirror, "_write", half)
    with pytest.raises(StorageError, match="does not answer: the connection was reset"):
        mirror.push(run, attempt=1)
    again = Mirror(str(tmp_path / "mirror"), "run-1")
    assert again.pull(tmp_path / "again") == first
    assert content(tmp_path / "again") == FILES
    assert again.push(run, attempt=2) is not None
    shutil.rmtree(tmp_path / "again")
    again.pull(tmp_path / "again")
    assert content(tmp_path / "again")["metrics.jsonl"].count("\n") == 2


def test_a_damaged_object_is_passed_over_and_named_when_there_is_no_other(
    run: Path, mirror: Mirror, tmp_path: Path
) -> None:
    first = mirror.push(run, attempt=1)
    write(run, {"log/step-000001/manifest.json": "more"})
    second = mirror.push(run, attempt=1)
    assert first is not None and second is not None
    stored(tmp_path, "objects")[second.files["log/step-000001/manifest.json"]].write_text("flip")
    assert mirror.pull(tmp_path / "again") == first
    digest = first.files["config.yaml"]
    stored(tmp_path, "objects")[digest].unlink()
    with pytest.raises(StorageError, match=rf"no snapshot can be trusted.*{digest}"):
        mirror.pull(tmp_path / "third")
    assert not (tmp_path / "third").exists()


def test_old_snapshots_go_with_what_only_they_had(run: Path, mirror: Mirror, tmp_path: Path) -> None:
    for number in range(5):
        write(run, {"metrics.jsonl": f"{number}\n"})
        mirror.push(run, attempt=1)
    assert len(stored(tmp_path, "snapshots")) == KEEP
    assert len(stored(tmp_path, "objects")) == len(set(FILES.values())) - 1 + KEEP
    mirror.pull(tmp_path / "again")
    assert content(tmp_path / "again")["metrics.jsonl"] == "4\n"


def test_the_newest_attempts_snapshot_is_the_newest(run: Path, mirror: Mirror, tmp_path: Path) -> None:
    for attempt in (9, 10):
        for _ in range(2):
            write(run, {"metrics.jsonl": f"{attempt}\n" * 2 if _ else f"{attempt}\n"})
            mirror.push(run, attempt)
    assert mirror.names() == ["010-000001.json", "010-000002.json"]
    mirror.pull(tmp_path / "again")
    assert content(tmp_path / "again")["metrics.jsonl"] == "10\n10\n"


@pytest.mark.parametrize("manifest", ["{}", "[]", '{"files": 3}', "half"])
def test_a_manifest_that_is_none_is_passed_over(run: Path, mirror: Mirror, tmp_path: Path, manifest: str) -> None:
    first = mirror.push(run, attempt=1)
    snapshots = tmp_path / "mirror" / "run-1" / "snapshots"
    (snapshots / "001-000002.json").write_text(manifest)
    (snapshots / "notes.json").write_text("of somebody else")
    assert mirror.pull(tmp_path / "again") == first
    pushed = mirror.push(run, attempt=1)
    assert pushed is not None and pushed.name == "001-000003.json"


def test_a_file_that_goes_meanwhile_puts_the_copy_off(
    run: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = mirror._send

    def retired(file: Path, path: str) -> str:
        if path.endswith("weights.pt"):
            file.unlink()
        return send(file, path)

    monkeypatch.setattr(mirror, "_send", retired)
    assert mirror.push(run, attempt=1) is None
    assert mirror.names() == []


@pytest.mark.parametrize("uri", ["relative/path", "s4://bucket", ""])
def test_a_uri_that_leads_nowhere_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.mirror=.*is invalid"):
        Mirror(uri, "run-1")


def mirroring(mirror: Any, run: Path, told: list[str], **options: Any) -> Mirroring:
    defaults: dict[str, Any] = {"every_s": 0.01, "grace_s": 5.0, "fence": lambda: None, "tell": told.append}
    return Mirroring(mirror, run, 1, **{**defaults, **options})


def first_snapshot(mirror: Mirror) -> None:
    deadline = time.monotonic() + scaled(10)
    while not mirror.names():
        assert time.monotonic() < deadline
        time.sleep(0.01)


async def test_a_run_is_copied_while_it_goes_on_and_at_its_end(run: Path, mirror: Mirror, tmp_path: Path) -> None:
    told: list[str] = []
    async with mirroring(mirror, run, told):
        await asyncio.to_thread(first_snapshot, mirror)
        write(run, {"metrics.jsonl": "the end\n"})
    mirror.pull(tmp_path / "again")
    assert content(tmp_path / "again")["metrics.jsonl"] == "the end\n"
    assert told == []


async def test_a_mirror_that_does_not_answer_is_told_once_and_costs_nothing(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mirror").write_text("a file, where a folder should be")
    told: list[str] = []
    async with mirroring(Mirror(str(tmp_path / "mirror"), "run-1"), run, told):
        await asyncio.sleep(0.2)
    assert len(told) == 1
    assert "mirror: run.mirror=" in told[0] and "does not answer" in told[0]


async def test_an_attempt_that_was_superseded_copies_nothing(run: Path, mirror: Mirror) -> None:
    def fence() -> None:
        raise Superseded("attempt 2 writes this run now")

    told: list[str] = []
    async with mirroring(mirror, run, told, fence=fence):
        await asyncio.sleep(0.1)
    assert mirror.names() == []
    assert len(told) == 1


async def test_a_mirror_that_hangs_does_not_hold_up_a_stop(run: Path) -> None:
    class Hanging:
        def push(self, folder: Path, attempt: int) -> None:
            time.sleep(5)

    told: list[str] = []
    with pytest.raises(RuntimeError, match="the run's own"):
        async with mirroring(Hanging(), run, told, every_s=60.0, grace_s=0.1):
            raise RuntimeError("the run's own")
    assert told == ["mirror: the last copy was not complete within 0.1 s; the previous copy remains"]


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a/../../../x", ""])
def test_a_manifest_that_names_files_outside_the_run_is_not_trusted(
    run: Path, mirror: Mirror, tmp_path: Path, name: str
) -> None:
    """Write access to the mirror must not allow writing or deleting anywhere else."""
    pushed = mirror.push(run, attempt=1)
    assert pushed is not None
    digest = next(iter(pushed.files.values()))
    write_sealed(stored(tmp_path, "snapshots")[pushed.name], {"files": {**pushed.files, name: digest}})
    with pytest.raises(StorageError, match="not inside it"):
        mirror.pull(tmp_path / "again")
    assert not (tmp_path / "again").exists()
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("digest", ["../../../precious", "AB", 7, None])
def test_a_manifest_that_names_other_objects_deletes_nothing_of_others(
    run: Path, mirror: Mirror, tmp_path: Path, digest: object
) -> None:
    (tmp_path / "precious").write_text("kept")
    first = mirror.push(run, attempt=1)
    assert first is not None
    write_sealed(stored(tmp_path, "snapshots")[first.name], {"files": {"a": digest}})
    for number in range(KEEP + 1):
        (run / "metrics.jsonl").write_text(f"{number}\n")
        mirror.push(run, attempt=1)
    assert (tmp_path / "precious").read_text() == "kept"


def test_links_are_not_followed_into_the_mirror(run: Path, mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    (run / "link.txt").symlink_to(tmp_path / "secret")
    pushed = mirror.push(run, attempt=1)
    assert pushed is not None
    assert "link.txt" not in pushed.files
