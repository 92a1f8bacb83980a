"""Stages are objects in one table. A new stage is one class and one line, and runs like all others."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from jobs.pipeline import run_stages
from jobs.prepare import without_prompts
from jobs.stages.stage import Artifact, Stage, StageJob
from jobs.stages.table import STAGES, stages_of, to_do
from jobs.why.explain import explain
from jobs.why.reader import read_facts
from orchestrator.config.config import Config
from orchestrator.config.loader import config_from_tree, load_kept_config, to_yaml
from orchestrator.errors import ConfigError
from orchestrator.run.folder import RunFolder, existing_run, open_run
from orchestrator.run.lineage import LINEAGE_FILE, read_lineage
from orchestrator.watching.telemetry import Telemetry


class Nothing(Stage):
    """Writes its number of steps, and what it read."""

    kind = "nothing"
    steps_key = "rl.steps"

    def makes(self, config: Config) -> Sequence[Artifact]:
        return (Artifact("nothing", "nothing.txt"),)

    async def run(self, job: StageJob) -> Mapping[str, Any]:
        job.output("nothing").write_text(f"{self.num_steps(job.config)} {sorted(job.inputs)}")
        return {"made": "nothing"}


class Reader(Nothing):
    kind = "reader"

    def reads(self, config: Config) -> Sequence[str]:
        return ("nothing",)


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in (Nothing(), Reader()):
        monkeypatch.setitem(STAGES, stage.kind, stage)


def config_of(root: Path, *stages: Any, **sections: Any) -> Config:
    tree = {"stages": list(stages), "run": {"root": str(root), "id": "demo"}, "telemetry": {"prometheus_port": None}}
    return config_from_tree({**tree, "reward": {"path": "x"}, **sections}, source="the test")


def run_all(config: Config) -> RunFolder:
    run = open_run(config)
    asyncio.run(run_stages(config, run, without_prompts(None), lambda line: None))  # type: ignore[arg-type]
    return run


@pytest.mark.parametrize("stages", [["sample", "preferences"], ["sample", "people"], ["sample", "score", "select"]])
def test_stages_that_compare_replies_refuse_episodes_and_say_what_to_do(tmp_path: Path, stages: list[Any]) -> None:
    sections = {"environment": {"name": "a.module:Class"}, "select": {"keep": "pairs"}}
    with pytest.raises(ConfigError, match=r"compares single replies.*select.keep=best.*environment.name: null"):
        stages_of(config_of(tmp_path, *stages, **sections))
    single = {"name": "sample", "kind": "sample", "set": {"environment.name": None}}
    assert stages_of(config_of(tmp_path, single, *stages[1:], **sections))
    kept = stages_of(config_of(tmp_path, "sample", "score", "select", "sft", **{**sections, "select": {"keep": "top"}}))
    assert [entry.name for entry in kept] == ["sample", "score", "select", "sft"]
    assert "rule a.module:Class" in kept[0].outside


def test_people_judge_the_log_of_the_newest_rl_before_them(tmp_path: Path) -> None:
    log = {"people": {"source": "log"}}
    *_, people = stages_of(config_of(tmp_path, "rl", {"name": "rl-2", "kind": "rl"}, "people", rl={"steps": 7}, **log))
    run = open_run(people.config)
    assert people.inputs(run)["experience"] == run.path / "stages" / "rl-2" / "log" / "step-000006" / "manifest.json"
    with pytest.raises(ConfigError, match="'people' reads experience, which no stage before it makes: put 'rl' before"):
        stages_of(config_of(tmp_path, "sample", "people", "rl", **log))
    with pytest.raises(ConfigError, match=r"rl\.samples_per_prompt=1: raise it"):
        stages_of(config_of(tmp_path, "rl", "people", rl={"samples_per_prompt": 1}, **log))
    with pytest.raises(ConfigError, match="the log holds episodes of several turns"):
        stages_of(config_of(tmp_path, "rl", "people", environment={"name": "a.module:Class"}, **log))
    by_stage = {"name": "people", "kind": "people", "set": {"people.source": "log"}}
    assert "experience" in stages_of(config_of(tmp_path, "rl", by_stage))[1].sources
    made = stages_of(config_of(tmp_path, "rl", "sample", "people"))[0]
    assert [each.kind for each in made.stage.makes(made.config)] == ["policy"]


def test_a_stage_takes_fewer_than_fifteen_lines() -> None:
    assert len([line for line in inspect.getsource(Nothing).splitlines() if line.strip()]) < 15


def test_a_new_stage_runs_is_told_of_and_is_not_run_again(tmp_path: Path) -> None:
    config = config_of(tmp_path, "nothing", rl={"steps": 7})
    run = run_all(config)
    assert (run.path / "nothing.txt").read_text() == "7 []"
    facts = read_facts(run.path, 0.0)
    assert facts is not None and explain(facts).standing.stages == {"nothing": "finished"}
    there = existing_run(config)
    assert there is not None and list(to_do(stages_of(config), there)) == []


def test_a_stage_comes_twice_under_two_names_with_keys_of_its_own(tmp_path: Path) -> None:
    config = config_of(
        tmp_path, "nothing", {"name": "again", "kind": "nothing", "set": {"rl.steps": 3}}, rl={"steps": 7}
    )
    assert load_kept_config(_written(tmp_path, config)).stages == config.stages
    run = run_all(config)
    assert (run.path / "nothing.txt").read_text() == "7 []"
    assert (run.path / "stages" / "again" / "nothing.txt").read_text() == "3 []"
    facts = read_facts(run.path, 0.0)
    assert facts is not None and explain(facts).standing.stages == {"nothing": "finished", "again": "finished"}
    with pytest.raises(ConfigError, match=r"'nothing' occurs twice.*\{name: nothing-2, kind: nothing\}"):
        stages_of(config_of(tmp_path, "nothing", "nothing"))


def _written(folder: Path, config: Config) -> Path:
    path = folder / "config.yaml"
    path.write_text(to_yaml(config))
    return path


def test_a_round_reads_what_the_newest_stage_before_it_made(tmp_path: Path) -> None:
    config = config_of(tmp_path, "nothing", {"rounds": 2, "stages": [{"kind": "reader", "name": "r"}, "reader"]})
    names = ["nothing", "r-1", "reader-1", "r-2", "reader-2"]
    stages = stages_of(config)
    assert [entry.name for entry in stages] == names
    assert [entry.sources["nothing"].name for entry in stages[1:]] == names[:-1]
    run = run_all(config)
    read = {made.stage: list(made.reads.values()) for made in read_lineage(run.path)}
    assert read["r-2"] == ["stages/reader-1/nothing.txt"]
    (run.path / "stages" / "r-2" / "nothing.txt").unlink()
    (run.path / "stages" / "reader-2" / "nothing.txt").unlink()
    assert [entry.name for entry in to_do(stages, run)] == ["r-2", "reader-2"]


def test_artifacts_say_where_they_come_from(tmp_path: Path) -> None:
    config = config_of(tmp_path, "nothing", {"name": "more", "kind": "reader"})
    run = run_all(config)
    first, second = read_lineage(run.path)
    assert (first.kind, first.path, first.stage, first.attempt) == ("nothing", "nothing.txt", "nothing", 1)
    assert first.result == {"made": "nothing"} and not first.reads
    assert second.path == "stages/more/nothing.txt" and second.reads == {"nothing": "nothing.txt"}
    assert second.read_sha256 == {"nothing.txt": first.sha256}
    assert first.config_sha256 == second.config_sha256 and first.sha256 != second.sha256
    assert (run.path / "stages" / "more" / "nothing.txt").read_text().endswith("['nothing']")
    longer = run_all(config_of(tmp_path / "other", "nothing", rl={"steps": 9}))
    assert read_lineage(longer.path)[0].config_sha256 != first.config_sha256


def test_what_was_made_and_not_yet_told_of_is_told_by_the_next_attempt(tmp_path: Path) -> None:
    config = config_of(tmp_path, "nothing", {"name": "more", "kind": "reader"})
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "nothing.txt").write_text("killed before it said so")
    run = run_all(config)
    assert (run.path / "nothing.txt").read_text() == "killed before it said so"
    assert [made.stage for made in read_lineage(run.path)] == ["nothing", "more"]


def test_a_stage_whose_readers_are_finished_is_not_run(tmp_path: Path) -> None:
    """As in a run from before the stage `sample` existed: it has preferences but no samples."""
    config = config_of(tmp_path, "nothing", {"name": "more", "kind": "reader"})
    run = open_run(config)
    place = run.path / "stages" / "more"
    place.mkdir(parents=True)
    (place / "nothing.txt").touch()
    assert list(to_do(stages_of(config), run)) == []


def test_a_stage_without_what_it_reads_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stage 'reader' reads nothing, .* put 'nothing' or 'reader' before it"):
        stages_of(config_of(tmp_path, "reader"))
    with pytest.raises(
        ConfigError, match=r"stage 'rl' reads reward_model.*'reward_model' before it.*or give .*reward\.path"
    ):
        stages_of(config_of(tmp_path, "rl", reward={}))
    with pytest.raises(
        ConfigError, match=r"'reward_model' reads preferences.*or give a preference file: preferences\.path"
    ):
        stages_of(config_of(tmp_path, "reward_model", "rl"))


@pytest.mark.parametrize(
    ("named", "hint"), [("reward-model", "did you mean 'reward_model'"), ("ppo", "now called 'rl'")]
)
def test_an_unknown_stage_is_refused_with_the_nearest_name(tmp_path: Path, named: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        stages_of(config_of(tmp_path, named))


def test_kept_configs_with_the_old_names_are_read(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "stages: [preferences, reward_model, ppo]\nppo: {steps: 4, advantage: grpo, samples_per_prompt: 4}\n"
    )
    config = load_kept_config(path)
    assert [entry.name for entry in stages_of(config)] == ["sample", "preferences", "reward_model", "rl"]
    assert config.rl.steps == 4


def test_damaged_lineage_is_told_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / LINEAGE_FILE).write_text(json.dumps({"artifacts": [{"kind": "x"}]}))
    with pytest.raises(Exception, match=r"lineage\.json is damaged.*Delete it"):
        read_lineage(tmp_path)


def test_rl_has_finished_when_its_last_step_is_saved_and_exported_and_it_said_so(tmp_path: Path) -> None:
    def left(steps: int = 20) -> list[str]:
        run = existing_run(config_of(tmp_path, "rl", rl={"steps": steps}))
        assert run is not None
        return [entry.name for entry in to_do(stages_of(config_of(tmp_path, "rl", rl={"steps": steps})), run)]

    run = open_run(config_of(tmp_path, "rl"))
    with Telemetry(run.path, run.id, 1, stage="rl") as telemetry:
        telemetry.event("stage_finished")
        assert left() == ["rl"]
        (run.checkpoints / "step-000020").mkdir(parents=True)
        (run.checkpoints / "step-000020" / "COMPLETE").touch()
        assert left() == ["rl"]
        run.export.mkdir()
        assert left() == []
        assert left(steps=21) == ["rl"]
        telemetry.event("stage_started")
        assert left() == ["rl"]


def test_a_loss_of_labels_or_scores_needs_a_file(tmp_path: Path) -> None:
    for kind, loss in (("preference", "kto"), ("reward_model", "ordinal")):
        sections: dict[str, Any] = {kind: {"loss": {"name": loss}}}
        with pytest.raises(
            ConfigError, match=rf"{kind}\.loss\.name='{loss}' learns (labels|scores).*preferences\.path"
        ):
            stages_of(config_of(tmp_path, "sample", "preferences", kind, **sections))
        stages_of(config_of(tmp_path, kind, preferences={"path": "p.jsonl"}, **sections))


def test_preferences_fit_into_the_policy_s_window(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"preference\.max_length=900 exceeds"):
        stages_of(config_of(tmp_path, "preference", preferences={"path": "p"}, preference={"max_length": 900}))
