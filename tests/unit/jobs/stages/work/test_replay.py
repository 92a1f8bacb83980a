"""What a replay refuses before it starts an actor."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from jobs.replay import main
from jobs.stages.work.replay import fingerprint, read_run_folder, steps_to_learn
from orchestrator.config.config import Config
from orchestrator.config.loader import to_yaml
from orchestrator.errors import ConfigError
from orchestrator.run.storage import write_json


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of three committed steps and a begun fourth, with a checkpoint of step 2."""
    folder = tmp_path / "demo-1"
    for step in range(4):
        (folder / "log" / f"step-{step:06d}").mkdir(parents=True)
        if step < 3:
            (folder / "log" / f"step-{step:06d}" / "manifest.json").write_text("{}")
    (folder / "checkpoints" / "step-000002").mkdir(parents=True)
    (folder / "checkpoints" / "step-000002" / "COMPLETE").touch()
    (folder / "config.yaml").write_text(to_yaml(Config.model_validate({"reward": {"path": "/models/reward"}})))
    return folder


def test_a_run_folder_opens_without_a_new_attempt(run: Path) -> None:
    config, opened = read_run_folder(run)
    assert (opened.id, opened.path, config.reward.path) == ("demo-1", run, "/models/reward")
    assert not (run / "attempts").exists()


def test_all_committed_steps_are_learned_by_default(run: Path) -> None:
    _, opened = read_run_folder(run)
    assert steps_to_learn(opened, None, from_checkpoint=False) == 3
    assert steps_to_learn(opened, 2, from_checkpoint=True) == 2


@pytest.mark.parametrize(
    ("until", "from_checkpoint", "message"),
    [
        (4, False, "holds 3 committed steps; --until 4"),
        (0, False, "--until 0"),
        (-1, False, "--until -1"),
        (1, True, "a checkpoint of step 1 or before .* the newest is step-000002"),
    ],
)
def test_steps_that_are_not_there_are_refused(run: Path, until: int, from_checkpoint: bool, message: str) -> None:
    _, opened = read_run_folder(run)
    with pytest.raises(ConfigError, match=message):
        steps_to_learn(opened, until, from_checkpoint=from_checkpoint)


def test_an_empty_log_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("reward: {path: /models/reward}")
    _, opened = read_run_folder(tmp_path)
    with pytest.raises(ConfigError, match="holds 0 committed steps; there is nothing to replay"):
        steps_to_learn(opened, None, from_checkpoint=False)


def test_the_command_says_what_is_wrong_and_ends_with_2(run: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(main)
    for arguments, message in (
        ([str(tmp_path)], "so it is no run folder"),
        ([str(run), "--to", str(run)], "is the run's own folder"),
        ([str(run), "--until", "9"], "holds 3 committed steps"),
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert message in result.output


def test_a_fingerprint_sees_every_file_of_its_role_and_no_other(tmp_path: Path) -> None:
    def of(**files: str) -> str:
        manifest = {name.replace("__", "/"): {"sha256": content} for name, content in files.items()}
        write_json(tmp_path / "manifest.json", manifest)
        return fingerprint(tmp_path, "policy")

    original = of(policy__weights="aa", policy__optimizer="bb", critic__weights="cc")
    assert of(critic__weights="dd", policy__optimizer="bb", policy__weights="aa") == original
    assert of(policy__weights="aa", policy__optimizer="b0", critic__weights="cc") != original
    assert of(policy__weights="aa", critic__weights="cc") != original
