"""`rlhf reward-model` checks what its stage reads and starts, before anything starts, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from jobs.check import engine_trial
from jobs.check.capacity import Cluster, capacity
from jobs.check.preflight import preflight
from jobs.resolve import WITHOUT_TRIAL, resolved
from jobs.stages.work import reward_model as module
from jobs.stages.work.reward_model import run_alone
from orchestrator.config.config import Config
from orchestrator.config.loader import config_from_tree
from orchestrator.errors import CapacityError, ConfigError, DataError, RlhfError
from orchestrator.planning.needs import NodeOffer
from orchestrator.planning.placement import Node
from orchestrator.run.folder import open_run
from tests.tiny import tiny_llama


class _StartedError(Exception):
    """In place of Ray."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: Any, **__: Any) -> NoReturn:
        raise _StartedError

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(module, "cluster", start)
    monkeypatch.setattr(engine_trial, "_trial", start)


@pytest.fixture
def tree(tmp_path: Path, model: Path) -> dict[str, Any]:
    rows = [{"prompt": f"Is {n} even?", "chosen": "Yes.", "rejected": "No idea."} for n in range(40)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "stages": ["reward_model", "rl"],
        "run": {"root": str(tmp_path / "runs")},
        "model": {"path": str(model), "dtype": "float32", "max_length": 128},
        "prompts": {"max_prompt_tokens": 32},
        "rollout": {"max_new_tokens": 32},
        "preferences": {"path": str(tmp_path / "pairs.jsonl")},
    }


def config_of(tree: dict[str, Any], **sections: Any) -> Config:
    merged = {**tree, **{name: {**tree.get(name, {}), **section} for name, section in sections.items()}}
    return config_from_tree(merged, source="the test")


def test_a_good_config_is_started(tree: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(_StartedError):
        run_alone(config_of(tree), None)
    text = capsys.readouterr().out
    assert "models: weights are whole; reward_model.base was tried small" in text
    assert "run folders: " in text and "vLLM" not in text


def _pointer(tree: dict[str, Any], tmp_path: Path) -> None:
    base = shutil.copytree(tree["model"]["path"], tmp_path / "base")
    (base / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    tree["reward_model"] = {"base": str(base)}


def _strict_template(tree: dict[str, Any], tmp_path: Path) -> None:
    base = shutil.copytree(tree["model"]["path"], tmp_path / "base")
    refuses = "{{ raise_exception('no conversations here') }}"
    (base / "chat_template.jinja").write_text(refuses)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": refuses}))
    tree["reward_model"] = {"base": str(base)}


def _broken_row(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "Hi", "chosen": "Hello"}\n')


def _all_held_out(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["preferences"]["held_out"] = 40


def _no_place(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["run"]["root"] = "/dev/null/x"


def _too_many_workers(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["reward_model"] = {"ranks": 1000}


def _no_model(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["reward_model"] = {"base": str(tmp_path / "gone")}


@pytest.mark.parametrize(
    ("spoil", "error", "match"),
    [
        (_pointer, DataError, "Git-LFS pointer"),
        (_strict_template, DataError, "no conversations here"),
        (_broken_row, DataError, r"pairs\.jsonl"),
        (_all_held_out, DataError, r"none is left to train on.*preferences\.held_out"),
        (_no_place, ConfigError, r"run\.root=/dev/null/x"),
        (_too_many_workers, CapacityError, "reward_model wants 1000"),
        (_no_model, DataError, "gone"),
    ],
)
def test_what_is_wrong_is_found_before_anything_starts(
    tree: dict[str, Any],
    tmp_path: Path,
    spoil: Callable[[dict[str, Any], Path], None],
    error: type[RlhfError],
    match: str,
) -> None:
    spoil(tree, tmp_path)
    with pytest.raises(error, match=match):
        run_alone(config_of(tree), None)


def test_all_that_is_wrong_is_told_at_once(tree: dict[str, Any], tmp_path: Path) -> None:
    _pointer(tree, tmp_path)
    _all_held_out(tree, tmp_path)
    _no_place(tree, tmp_path)
    with pytest.raises(ConfigError, match=r"3 problems:\n(?s:.*)held_out(?s:.*)Git-LFS(?s:.*)run\.root"):
        run_alone(config_of(tree), None)


def test_what_the_stage_does_not_use_is_no_obstacle(tree: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(
        tree,
        prompts={"path": str(tmp_path / "gone.jsonl")},
        run={"mirror": "s3://no-such-bucket/x"},
        telemetry={"mlflow_uri": "http://127.0.0.1:9", "prometheus_host": "192.0.2.1"},
        evaluation={"prompts": 4, "gold": "no_such_module:rule"},
        critic={"path": str(tmp_path / "gone")},
        reference={"path": str(tmp_path / "gone")},
        rollout={"engine": "vllm"},
    )
    with pytest.raises(_StartedError):
        run_alone(config, None)


def test_a_run_of_other_stages_goes_on_in_its_folder(tree: dict[str, Any]) -> None:
    config = config_of(tree, run={"id": "demo"})
    open_run(resolved(config, lambda line: None, keys=WITHOUT_TRIAL))
    with pytest.raises(_StartedError):
        run_alone(config, None)
    with pytest.raises(ConfigError, match=r"reward_model\.epochs: .*matters"):
        run_alone(config_of(tree, run={"id": "demo"}, reward_model={"epochs": 7}), None)


def test_the_stage_reads_no_prompts_as_part_of_a_run_either(tree: dict[str, Any]) -> None:
    tree["stages"] = ["reward_model"]
    found = preflight(config_of(tree, prompts={"path": "/nowhere.jsonl"}))
    assert found.problems == []
    assert found.require().prompts.train == ()
    tree["stages"] = ["reward_model", "rl"]
    assert "/nowhere.jsonl" in str(preflight(config_of(tree, prompts={"path": "/nowhere.jsonl"})).problems[0])


def test_check_places_the_stages_workers(tree: dict[str, Any]) -> None:
    machine = Cluster("a toy", [Node("a", 2.0)], {"a": NodeOffer(None)})
    for stages in (["reward_model"], ["reward_model", "rl"]):
        tree["stages"] = stages
        with pytest.raises(CapacityError, match="reward_model wants 3"):
            capacity(config_of(tree, reward_model={"ranks": 3}), machine)
    tree["stages"] = ["reward_model"]
    slots = capacity(config_of(tree, rollout={"cpus_per_replica": 64}), machine).plan.slots
    assert [(slot.role, slot.threads) for slot in slots] == [("reward_model", 2)]
    tree |= {"stages": ["rl"], "reward": {"path": tree["model"]["path"]}}
    unread = capacity(config_of(tree, reward_model={"base": "/no/such/model"}), machine)
    assert "reward_model" not in unread.memory_of
