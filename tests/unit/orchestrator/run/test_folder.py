"""A run is opened once per attempt, with its first config except for keys that do not affect results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.config import Config
from orchestrator.config.loader import load_config
from orchestrator.errors import ConfigError, StorageError, Superseded
from orchestrator.run.folder import check_run_folder, has_finished, open_run
from orchestrator.watching.telemetry import Telemetry


def config(root: Path, **sections: Any) -> Config:
    run = {"root": root, "id": "demo"}
    return Config.model_validate({"reward": {"path": "/models/reward"}, "run": run, **sections})


def test_the_same_config_opens_the_next_attempt(tmp_path: Path) -> None:
    assert [open_run(config(tmp_path)).attempt for _ in range(3)] == [1, 2, 3]
    assert open_run(config(tmp_path)).notes == ()
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == ["attempts", "config.yaml"]


def test_a_change_that_does_not_matter_is_told_and_both_configs_are_kept(tmp_path: Path) -> None:
    first, second = config(tmp_path), config(tmp_path, rl={"steps": 40}, deadlines={"learn_s": 60})
    open_run(first)
    open_run(first)
    check_run_folder(second)
    run = open_run(second)
    assert run.notes == (
        "config changed since the last attempt: rl.steps: 20 -> 40",
        "config changed since the last attempt: deadlines.learn_s: 3600.0 -> 60.0",
    )
    assert load_config(run.path / "config.yaml") == second
    assert load_config(run.path / "config.attempt-002.yaml") == first
    assert open_run(second).notes == ()


def test_a_change_that_matters_is_refused_with_all_that_changed(tmp_path: Path) -> None:
    open_run(config(tmp_path))
    other = config(tmp_path, policy={"learning_rate": 1e-4}, deadlines={"learn_s": 60})
    for attempt in (open_run, check_run_folder):
        with pytest.raises(ConfigError, match="'demo' was started with another config") as caught:
            attempt(other)
        assert "policy.learning_rate: 5e-06 -> 0.0001  (matters)" in str(caught.value)
        assert "deadlines.learn_s: 3600.0 -> 60.0  (does not matter)" in str(caught.value)
    assert sorted(path.name for path in (tmp_path / "demo").rglob("*")) == ["001", "attempts", "config.yaml"]


def test_a_kept_config_that_was_damaged_is_named(tmp_path: Path) -> None:
    kept = open_run(config(tmp_path)).path / "config.yaml"
    kept.write_bytes(kept.read_bytes()[:100] + b"\xff")
    with pytest.raises(ConfigError, match=r"demo/config\.yaml is not UTF-8"):
        open_run(config(tmp_path))


def test_a_run_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("")
    with pytest.raises(StorageError, match=r"run folder .*demo can't be made"):
        open_run(config(tmp_path))


def test_an_older_attempt_notices_that_a_newer_one_writes_the_run(tmp_path: Path) -> None:
    older = open_run(config(tmp_path))
    older.require_newest()
    newer = open_run(config(tmp_path))
    newer.require_newest()
    with pytest.raises(Superseded, match="attempt 2 now writes this run, so attempt 1 stops"):
        older.require_newest()


def test_a_stage_has_finished_when_the_last_it_told_is_that(tmp_path: Path) -> None:
    run = open_run(config(tmp_path))
    assert not has_finished(run.path, "rl")
    with (
        Telemetry(run.path, run.id, 1, stage="rl") as telemetry,
        Telemetry(run.path, run.id, 1, stage="other") as other,
    ):
        for kind, finished in {"stage_started": False, "failure": False, "stage_finished": True}.items():
            telemetry.event(kind)
            other.event("stage_started")
            assert has_finished(run.path, "rl") == finished
        telemetry.event("stage_started")
        assert not has_finished(run.path, "rl")


def test_runs_that_start_in_the_same_second_get_folders_of_their_own(tmp_path: Path) -> None:
    runs = [open_run(config(tmp_path, run={"root": tmp_path, "seed": seed})) for seed in range(5)]
    assert len({run.path for run in runs}) == 5
    assert [run.attempt for run in runs] == [1] * 5
    assert [load_config(run.path / "config.yaml").run.seed for run in runs] == list(range(5))
    for run in runs:  # each id is valid as run.id
        config(tmp_path, run={"root": tmp_path, "id": run.id})


def test_only_this_user_can_enter_a_run_folder_and_who_opens_it_keeps_it_open(tmp_path: Path) -> None:
    run = open_run(config(tmp_path))
    assert run.path.stat().st_mode & 0o777 == 0o700
    run.path.chmod(0o750)
    open_run(config(tmp_path))
    assert run.path.stat().st_mode & 0o777 == 0o750
