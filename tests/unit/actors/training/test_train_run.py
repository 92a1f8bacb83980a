from __future__ import annotations

from pathlib import Path

import pytest
from ray.train import ControllerError, WorkerGroupError

from actors.training.train_run import PROGRESS_FILE, Restarted, _Lines, failure
from orchestrator.errors import CapacityError, RoleError


def test_only_whole_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / PROGRESS_FILE
    lines = _Lines(path)
    assert lines.next() is None
    path.write_text('{"loss": 1}\n{"los')
    assert lines.next() == {"loss": 1}
    assert lines.next() is None
    with path.open("a") as stream:
        stream.write('s": 2}\n')
    assert lines.next() == {"loss": 2}
    assert lines.next() is None


def test_a_file_that_begins_anew_is_a_restart(tmp_path: Path) -> None:
    path = tmp_path / PROGRESS_FILE
    path.write_text('{"loss": 1}\n')
    lines = _Lines(path)
    lines.next()
    path.unlink()
    with pytest.raises(Restarted):
        lines.next()
    assert lines.next() is None
    path.write_text('{"loss": 3}\n')
    assert lines.next() == {"loss": 3}


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
