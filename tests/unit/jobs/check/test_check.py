"""The preflight and the output of `rlhf check`, in process, on a tiny model; nothing is started."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from actors.models.size import model_size
from jobs.check.batches import batch_rows
from jobs.check.capacity import Cluster, capacity
from jobs.check.preflight import preflight
from jobs.check.report import check
from jobs.prepare import policy_chat, without_prompts
from orchestrator.config.config import Config
from orchestrator.config.loader import config_from_tree
from orchestrator.data.records import Message
from orchestrator.errors import CapacityError, ConfigError, DataError
from orchestrator.planning.memory import MIB
from orchestrator.planning.needs import NodeOffer
from orchestrator.planning.placement import Node
from tests.tiny import tiny_llama, tiny_scorer

GOLD = "actors.rewards.gold:vader_positivity"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def tree(tmp_path: Path, model: Path) -> dict[str, Any]:
    rows = [json.dumps({"prompt": f"Say something about the number {index}.", "answer": "7"}) for index in range(40)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    return {
        "run": {"root": str(tmp_path / "runs")},
        "model": {"path": str(model), "dtype": "float32", "max_length": 128},
        "prompts": {"path": str(tmp_path / "prompts.jsonl"), "max_prompt_tokens": 100},
        "reward": {"name": "rules", "rules": [{"function": GOLD}]},
        "rollout": {"max_new_tokens": 16, "cpus_per_replica": 1},
        "rl": {"steps": 5, "prompts_per_step": 6, "samples_per_prompt": 4},
        "algorithm": {"minibatches": 2, "epochs": 3},
        "policy": {"schedule": "linear", "learning_rate": 3e-5, "warmup_optimizer_steps": 2},
        "critic": {"warmup_steps": 1},
        "evaluation": {"prompts": 4},
    }


def config_of(tree: dict[str, Any], **sections: Any) -> Config:
    return config_from_tree({**tree, **sections}, source="the test")


def test_batch_arithmetic_by_hand(tree: dict[str, Any]) -> None:
    rows = dict(batch_rows(config_of(tree), num_prompts=20))
    assert rows["samples per step"] == "6 prompts × 4 = 24"
    assert rows["optimizer steps per step"] == "3 epochs × 2 minibatches of 12 samples = 6"
    assert rows["optimizer steps in all"] == "policy 24, critic 30, in 5 steps"
    assert rows["passes over the prompts"] == "30 of 20 prompts = 1.50"
    # Warm-up: first a third of the peak; linear: the last of 30 is one step of 28 above zero.
    assert rows["learning rate, policy"] == (
        f"linear: {1e-5:.2e} at the first, {3e-5 / 28:.2e} at the last of 30, {3e-5:.2e} after 2"
    )


@pytest.mark.parametrize(
    ("saved", "evaluated", "expected"),
    [
        (0, 0, "the last: no earlier step is both saved and evaluated"),
        (2, 0, "the last: no earlier step is both saved and evaluated"),
        (3, 2, "the last: no earlier step is both saved and evaluated"),
        (2, 2, "by evaluation/gold_mean, among steps 2, 4 and 5"),
        (1, 1, "by evaluation/gold_mean, among steps 1, 2, 3, ... and 5"),
    ],
)
def test_which_checkpoints_compete_to_be_the_best(
    tree: dict[str, Any], saved: int, evaluated: int, expected: str
) -> None:
    sections = {"checkpoints": {"every_steps": saved}, "evaluation": {"prompts": 4, "every_steps": evaluated}}
    assert dict(batch_rows(config_of(tree, **sections), num_prompts=20))["best checkpoint"] == expected
    sections["checkpoints"]["best_metric"] = None  # type: ignore[assignment]
    assert "best checkpoint" not in dict(batch_rows(config_of(tree, **sections), num_prompts=20))


def test_a_run_without_a_stage_that_samples_needs_no_prompts(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 12)
    given = {"stages": ["reward_model"], "preferences": {"path": str(tmp_path / "pairs.jsonl")}}
    missing = {"prompts": {"path": str(tmp_path / "no-such.jsonl"), "max_prompt_tokens": 100}}
    assert preflight(config_of(tree, **given, **missing)).require().prompts.train == ()
    with pytest.raises(DataError, match=r"no-such\.jsonl"):
        preflight(config_of(tree, **missing)).require()


def test_a_good_config_is_checked_without_a_cluster(
    tree: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    check(config_of(tree), None)
    text = capsys.readouterr().out
    assert "<|im_start|>user" in text and re.search(r"as the model gets it, \d+ tokens", text)
    assert "a reply ends with '<|im_end|>' (token 0)" in text
    assert "plan: this machine" in text and "memory needed about" in text
    assert "ok: a run can start" in text


def test_a_bad_config_still_shows_the_plan_and_then_fails_with_everything(
    tree: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = config_of(tree, prompts={"path": "/nowhere.jsonl", "max_prompt_tokens": 100}, run={"root": "/dev/null/x"})
    with pytest.raises(ConfigError, match=r"2 problems:\n- /nowhere.jsonl does not exist.*\n- run.root=/dev/null/x"):
        check(config, None)
    text = capsys.readouterr().out
    assert "plan: this machine" in text and "ok:" not in text


def test_a_rule_that_fails_on_every_prompt_is_found_before_the_run(tree: dict[str, Any]) -> None:
    tree["prompts"]["path"] = str(Path(tree["prompts"]["path"]).with_name("plain.jsonl"))
    Path(tree["prompts"]["path"]).write_text("\n".join(json.dumps({"prompt": f"Count to {n}."}) for n in range(40)))
    rules = [{"function": "actors.rewards.rules:exact_answer"}]
    found = preflight(config_of(tree, reward={"name": "rules", "rules": rules}))
    with pytest.raises(ConfigError, match=r"failed on all of 8 sample prompts: .*KeyError: 'answer'"):
        found.require()


def test_a_rule_whose_module_is_broken_is_refused(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_rules.py").write_text("def score(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"'broken_rules' can't be imported \(SyntaxError"):
        preflight(config_of(tree, reward={"name": "rules", "rules": [{"function": "broken_rules:score"}]})).require()


def test_a_rule_that_scores_is_named_in_the_notes(tree: dict[str, Any]) -> None:
    rules = [{"function": "actors.rewards.rules:exact_answer"}]
    found = preflight(config_of(tree, reward={"name": "rules", "rules": rules}))
    assert "reward (rules): scores a made-up reply to 8 of 8 sample prompts" in found.notes
    assert len(found.require().prompts.train) > 0


def test_a_reward_model_without_a_head_or_statistics_is_refused(
    tree: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    headless = preflight(config_of(tree, reward={"name": "model", "path": str(model), "normalise": False}))
    with pytest.raises(DataError, match="no scalar head"):
        headless.require()
    scorer = str(tiny_scorer(tmp_path / "scorer"))
    with pytest.raises(DataError, match=r"has no reward_stats.json"):
        preflight(config_of(tree, reward={"name": "model", "path": scorer})).require()
    assert preflight(config_of(tree, reward={"name": "model", "path": scorer, "normalise": False})).problems == []


def test_a_bad_preference_file_is_found_before_the_run(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "Hi", "chosen": "Hello"}\n')
    config = config_of(
        tree,
        stages=["reward_model", "rl"],
        preferences={"path": str(tmp_path / "pairs.jsonl")},
        reward={"name": "model"},
    )
    with pytest.raises(DataError, match=r"pairs.jsonl"):
        preflight(config).require()


def test_the_size_of_a_model_comes_from_its_config_alone(model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    size = model_size(tmp_path)
    embedding, attention, mlp, norms = 384 * 64, 64 * 64 + 2 * 64 * 32 + 64 * 64, 3 * 64 * 128, 2 * 64
    assert size.num_params == embedding + 2 * (attention + mlp + norms) + 64
    assert (size.num_layers, size.hidden, size.feed_forward, size.vocabulary) == (2, 64, 128, 384)
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(DataError, match="no architecture known here"):
        model_size(tmp_path)


def test_a_cluster_too_small_in_cores_or_memory_is_refused(tree: dict[str, Any]) -> None:
    config = config_of(tree)
    with pytest.raises(CapacityError, match="too few CPUs"):
        capacity(config, Cluster("a toy", [Node("a", 0.5)], {"a": NodeOffer(None)}))
    with pytest.raises(CapacityError, match="too little memory: a has 0.5 GiB"):
        capacity(config, Cluster("a toy", [Node("a", 2.0)], {"a": NodeOffer(512 * MIB)}))
    found = capacity(config, Cluster("a toy", [Node("a", 2.0)], {"a": NodeOffer(64 * 1024 * MIB)}))
    assert found.warnings == [] and set(found.memory_of) == {slot.role for slot in found.plan.slots}


def test_the_disk_of_a_run_is_that_of_its_stages(tree: dict[str, Any], model: Path, tmp_path: Path) -> None:
    def disk(*stages: Any, **sections: Any) -> float:
        found = config_of(tree, stages=list(stages), **sections)
        return capacity(found, Cluster("a toy", [Node("a", 8.0)], {"a": NodeOffer(None)})).disk_bytes

    num_params = model_size(model).num_params
    given = {"demonstrations": {"path": "x"}, "sft": {"max_length": 64}}
    again = {"name": "again", "kind": "sft"}
    assert disk("sft", **given) == (4 + 28) * num_params
    assert disk("sft", again, **given) == (8 + 28) * num_params, "one training has checkpoints at a time"
    assert (
        disk("sft", demonstrations={"path": "x"}, sft={**given["sft"], "checkpoint_every_steps": 0}) == 4 * num_params
    )
    keys = {
        "rl": {"steps": 10},
        "checkpoints": {"keep": 2},
        "evaluation": {"every_steps": 0},
        "algorithm": {"name": "grpo"},
    }
    found = config_of(tree, **keys)
    tokens = 10 * found.samples_per_step * found.model.max_length
    assert disk("rl", **keys) == (3 * 14 + 4) * num_params + 40 * tokens
    sampled = 40 * found.sample.prompts * found.sample.samples_per_prompt * found.model.max_length
    assert disk("sample", "rl", **keys) == disk("rl", **keys) + sampled


def test_rows_on_disk_are_counted_while_a_training_reads_them(tree: dict[str, Any], tmp_path: Path) -> None:
    talks, pairs, labels = (tmp_path / f"{name}.jsonl" for name in ("talks", "pairs", "labels"))
    write(talks, [{"prompt": f"number {n}?", "response": "yes"} for n in range(300)])
    write(pairs, [{"prompt": f"number {n}?", "chosen": "yes", "rejected": "no"} for n in range(300)])
    write(labels, [{"prompt": f"number {n}?", "completion": "yes", "label": n % 2 == 0} for n in range(300)])

    def rows(stage: str, **sections: Any) -> float:
        config = config_of(tree, stages=[stage], **sections)
        machine = Cluster("a toy", [Node("a", 8.0)], {"a": NodeOffer(None)})
        prepared = without_prompts(policy_chat(config))
        return capacity(config, machine, prepared).disk_bytes - capacity(config, machine).disk_bytes

    chat = policy_chat(config_of(tree))
    num_tokens = sum(len(chat.reply((Message("user", f"number {n}?"),), "yes")) for n in range(300))
    whole = 1.1 * (5 * num_tokens + 40 * 300)
    length = {"max_length": 100}
    found = rows("sft", demonstrations={"path": str(talks), "held_out": 0}, sft=length)
    assert found == pytest.approx(whole, rel=0.05)
    given = {"path": str(pairs), "held_out": 0}
    for stage in ("reward_model", "preference"):
        assert rows(stage, preferences=given, **{stage: length}) == pytest.approx(2 * whole, rel=0.05)
    kto = {**length, "loss": {"name": "kto"}, "epochs": 3}
    found = rows("preference", preferences={"path": str(labels), "held_out": 0}, preference=kto)
    assert found == pytest.approx(4 * whole, rel=0.05)


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_an_address_of_another_kind_is_refused_with_the_command_that_takes_it(tree: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="rlhf submit --address"):
        check(config_of(tree), "ray://head:10001")


HOSTILE = "tests.unit.actors.rewards.hostile_rules"


@pytest.mark.parametrize(
    ("rule", "fault"),
    [
        ("exits", r"reward \(rules\) failed on all of 8 sample prompts: rule exits: SystemExit: 0"),
        (
            "hangs",
            r"reward \(rules\) failed on all of 8 sample prompts: rule hangs gave no answer within rule_limits",
        ),
    ],
)
def test_a_rule_that_exits_or_hangs_is_told_by_check(tree: dict[str, Any], rule: str, fault: str) -> None:
    reward = {"name": "rules", "rules": [{"function": f"{HOSTILE}:{rule}"}]}
    found = preflight(config_of(tree, reward=reward, rule_limits={"call_s": 0.5}))
    with pytest.raises(ConfigError, match=fault):
        found.require()


def test_a_rule_that_exits_on_some_prompts_is_counted(tree: dict[str, Any]) -> None:
    reward = {"name": "rules", "rules": [{"function": f"{HOSTILE}:sometimes_exits"}]}
    notes = "\n".join(preflight(config_of(tree, reward=reward)).notes)
    assert re.search(r"reward \(rules\): scores a made-up reply to [1-8] of 8 sample prompts", notes)


def test_gold_rules_are_tried_too(tree: dict[str, Any]) -> None:
    found = preflight(config_of(tree, evaluation={"prompts": 4, "gold": f"{HOSTILE}:exits"}))
    with pytest.raises(ConfigError, match=r"gold, .*:exits\) failed on all .* SystemExit: 0.* evaluation\.gold"):
        found.require()


@pytest.mark.parametrize(
    ("width", "misfits"),
    [
        (3, "2 attention heads, intermediate_size=128"),
        (4, "2 attention heads"),
        (5, "2 attention heads, intermediate_size=128, 384 rows of the embedding (a vocabulary of 384, padded)"),
    ],
)
def test_a_model_that_the_workers_of_an_engine_cannot_divide_is_refused_with_widths_that_work(
    tree: dict[str, Any], width: int, misfits: str
) -> None:
    def problems(width: int) -> list[str]:
        found = preflight(config_of(tree, rollout={**tree["rollout"], "tensor_parallel_size": width}))
        return [str(error) for error in found.problems if "tensor_parallel_size" in str(error)]

    (told,) = problems(width)
    assert f"refuse it: {misfits}. Set it to one of 1, 2." in told
    assert problems(2) == []
