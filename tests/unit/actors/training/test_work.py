from __future__ import annotations

from pathlib import Path

import pytest

from actors.training.work import PROGRESS_FILE, Lines, WorkFolder, open_work
from orchestrator.errors import DataError, RoleError, Superseded


def test_only_the_work_of_the_same_training_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    assert not open_work(folder, "one")
    (folder / "checkpoints" / "step-000001").mkdir()
    assert open_work(folder, "one")
    assert (folder / "checkpoints" / "step-000001").exists()
    assert not open_work(folder, "two")
    assert list((folder / "checkpoints").iterdir()) == []


def test_only_the_newest_try_may_write(tmp_path: Path) -> None:
    older, newer = WorkFolder(tmp_path, "a"), WorkFolder(tmp_path, "b")
    older.claim()
    older.require_newest()
    newer.claim()
    newer.require_newest()
    with pytest.raises(Superseded, match="later try"):
        older.require_newest()


def test_an_error_of_one_rank_is_there_for_the_next_try_and_not_for_the_next_driver(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    open_work(folder, "one")
    work = WorkFolder(folder, "a")
    assert work.failures() == []
    work.failed(RoleError("reward_model", 1, "train", "ValueError: broken"))
    work.failed(DataError("no such file"))
    role, data = work.failures()
    assert isinstance(role, RoleError) and (role.rank, role.cause) == (1, "ValueError: broken")
    assert isinstance(data, DataError) and str(data) == "no such file"
    open_work(folder, "one")
    assert work.failures() == []


def test_only_whole_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / PROGRESS_FILE
    lines = Lines(path)
    assert lines.next() is None
    path.write_text('{"loss": 1}\n{"los')
    assert lines.next() == {"loss": 1}
    assert lines.next() is None
    with path.open("a") as stream:
        stream.write('s": 2}\n')
    assert lines.next() == {"loss": 2}
    assert lines.next() is None


def test_half_a_line_of_a_killed_try_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / PROGRESS_FILE
    path.write_text('{"step": 0, "metrics": {}}\n{"step": 1, "met')
    lines = Lines(path)
    assert lines.next()["step"] == 0
    assert lines.next() is None
    work = WorkFolder(tmp_path, "b")
    work.claim()
    work.started(0)
    work.stepped(0, {"loss": 0.1})
    assert [lines.next(), lines.next(), lines.next()] == [
        {"continues_after": 0},
        {"step": 0, "metrics": {"loss": 0.1}},
        None,
    ]
