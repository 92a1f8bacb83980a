"""`why` for runs with some of the stages and for other commands: each records its start and end."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

import jobs.stages.work.replay
from jobs.pipeline import run_stages
from jobs.prepare import without_prompts
from jobs.report.data import read_run
from jobs.stages.events import stage_events
from jobs.stages.settings import alone
from jobs.stages.stage import Stage, StageJob
from jobs.stages.table import STAGES, stages_of, to_do
from jobs.why.explain import Explanation, explain
from jobs.why.reader import read_facts
from orchestrator.config.changes import changed_keys
from orchestrator.config.config import Config
from orchestrator.config.loader import config_from_tree
from orchestrator.errors import DataError
from orchestrator.run.attempts import claim
from orchestrator.run.folder import RunFolder, existing_run, open_run
from orchestrator.types import State
from orchestrator.watching.telemetry import Telemetry

LONG_AFTER_S = 1e6


def config_of(root: Path, *stages: str, **sections: Any) -> Config:
    tree = {"stages": list(stages), "run": {"root": str(root), "id": "demo-1"}, "telemetry": {"prometheus_port": None}}
    return config_from_tree({**tree, "reward": {"path": "x"}, **sections}, source="test")


def run_once(
    monkeypatch: pytest.MonkeyPatch, config: Config, failing: str | None = None, alone_stage: Any = None
) -> RunFolder:
    """The pipeline as commands run it, without the stages' work."""

    async def work(stage: Stage, job: StageJob) -> dict[str, Any]:
        if job.name == failing:
            raise DataError("no such file")
        for made in job.makes:
            (job.run.place / made.path).mkdir() if stage.kind in {"rl", "reward_model"} else job.output(
                made.kind
            ).touch()
        if stage.kind == "reward_model":
            (job.run.place / "reward_model.json").write_text("{}")
        return {}

    for stage in STAGES.values():
        monkeypatch.setattr(type(stage), "run", work)
    run = open_run(config)
    prepared = without_prompts(None)  # type: ignore[arg-type]
    chosen = config if alone_stage is None else alone(config, alone_stage)
    asyncio.run(run_stages(chosen, run, prepared, lambda line: None))
    return run


def why(folder: Path) -> Explanation:
    """As seen long afterwards, without the heartbeat, which an attempt may lose."""
    (folder / "heartbeat.json").unlink(missing_ok=True)
    newest = max((path.stat().st_mtime for path in folder.rglob("*")), default=0.0)
    facts = read_facts(folder, newest + LONG_AFTER_S)
    assert facts is not None
    return explain(facts)


@pytest.mark.parametrize(
    "stages",
    [
        ("sample",),
        ("sample", "preferences"),
        ("reward_model",),
        ("sample", "preferences", "reward_model"),
        ("rl",),
        ("reward_model", "rl"),
    ],
)
def test_a_finished_run_of_any_stages_is_told_as_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages: tuple[str, ...]
) -> None:
    needs_file = "reward_model" in stages and "preferences" not in stages
    config = config_of(tmp_path, *stages, **({"preferences": {"path": "given.jsonl"}} if needs_file else {}))
    run = run_once(monkeypatch, config) if not needs_file else _with_file(tmp_path, monkeypatch, config)
    explained = why(run.path)
    assert explained.state == "finished"
    assert explained.first_failure is None
    assert explained.standing.stages == dict.fromkeys(stages, "finished")
    if "rl" not in stages:  # which must save its last step
        assert left(config) == []


def left(config: Config) -> list[str]:
    run = existing_run(config)
    assert run is not None
    return [entry.name for entry in to_do(stages_of(config), run)]


def _with_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Config) -> RunFolder:
    (tmp_path / "given.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    return run_once(monkeypatch, config)


def test_a_stage_that_fails_is_told_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, "reward_model", preferences={"path": "given.jsonl"})
    with pytest.raises(DataError):
        run_once(monkeypatch, config, failing="reward_model")
    explained = why(tmp_path / "demo-1")
    assert explained.state == "failed"
    assert explained.first_failure is not None and explained.first_failure.cause == "no such file"


def test_an_attempt_is_finished_with_the_stages_that_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward model is trained alone; then the run continues with rl and dies."""
    alone = config_of(tmp_path, "reward_model", preferences={"path": "given.jsonl"})
    longer = config_of(tmp_path, "reward_model", "rl", preferences={"path": "given.jsonl"})
    assert [change.matters for change in changed_keys(alone, longer)] == [False]
    assert [change.matters for change in changed_keys(longer, alone)] == [True]
    run_once(monkeypatch, alone)
    assert left(longer) == ["rl"]
    with pytest.raises(DataError):
        run_once(monkeypatch, longer, failing="rl")
    explained = why(tmp_path / "demo-1")
    assert explained.state == "failed"
    assert [line.partition(": ")[2] for line in explained.earlier] == ["finished"]
    assert explained.standing.stages == {"reward_model": "finished", "rl": "failed"}


def test_a_stage_run_alone_is_finished_although_the_config_has_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, "reward_model", "rl", preferences={"path": "given.jsonl"})
    run = run_once(monkeypatch, config, alone_stage="reward_model")
    explained = why(run.path)
    assert explained.state == "finished"
    assert explained.standing.stages == {"reward_model": "finished", "rl": "not begun"}
    assert "to continue: rlhf run --config" in "\n".join(explained.now)
    assert left(config) == ["rl"]
    run_once(monkeypatch, config)
    explained = why(run.path)
    assert explained.state == "finished" and explained.now == ["finished; there is nothing left to do"]
    assert [line.partition(": ")[2] for line in explained.earlier] == ["finished"]


def test_the_report_calls_a_run_finished_only_when_its_last_stage_is(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("stages: [reward_model, rl]\n")
    for stage, status in (("reward_model", "not finished"), ("rl", "finished")):
        with Telemetry(tmp_path, "demo-1", 1, stage=stage) as telemetry:
            with stage_events(telemetry, ["reward_model", "rl"], tmp_path / "checkpoints"):
                with telemetry.step(0) as record:
                    record({"reward/mean": 0.0})
        assert read_run(tmp_path).status == status


@pytest.mark.parametrize("ends", ["finished", "failed", "stopped", "killed"])
def test_a_replay_is_told_by_how_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str) -> None:
    async def learn(*arguments: Any) -> tuple[State, tuple[str, ...]]:
        if ends == "failed":
            raise DataError("no such file")
        if ends == "stopped":
            raise asyncio.CancelledError
        return State(3, 0.1), ("policy",)

    monkeypatch.setattr(jobs.stages.work.replay._Replay, "_learn", learn)
    monkeypatch.setattr(jobs.stages.work.replay, "_tell", lambda *arguments: None)
    folder = tmp_path / "replay"
    (folder / "attempts").mkdir(parents=True)
    attempt = claim(folder, wait_s=1.0, tell=lambda line: None)
    config = config_of(tmp_path, "rl")
    replay = jobs.stages.work.replay._Replay(config, RunFolder(tmp_path, "demo-1", 0), folder, attempt, 3, False)
    if ends == "killed":
        with Telemetry(folder, "demo-1", attempt, stage="replay") as telemetry:
            telemetry.event("stage_started", stages=["replay"])
    else:
        try:
            asyncio.run(replay.run())
        except (DataError, asyncio.CancelledError):
            assert ends != "finished"
    if ends == "finished":
        assert json.loads((folder / "heartbeat.json").read_text())["ended"] == "finished"
    explained = why(folder)
    assert explained.state == ends
    assert list(explained.standing.stages) == ["replay"]
    assert ("rlhf replay" in "\n".join(explained.now)) == (ends != "finished")
    assert "rlhf run" not in "\n".join(explained.now)


def test_a_stop_without_any_checkpoint_makes_no_folder(tmp_path: Path) -> None:
    with Telemetry(tmp_path, "demo-1", 1, stage="preferences") as telemetry:
        with pytest.raises(asyncio.CancelledError), stage_events(telemetry, ["preferences"], tmp_path / "checkpoints"):
            raise asyncio.CancelledError
    assert not (tmp_path / "checkpoints").exists()
