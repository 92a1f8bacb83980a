"""`rlhf plan` in process: its output, its refusals, and that its proposal is a valid config."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from jobs.check.capacity import _Sizes, memory_per_role
from jobs.command import out
from jobs.plan import command as command
from jobs.plan.report import MeanLengths, Target, plan
from jobs.plan.work import dimensions, layout_of, models_of, work_of
from orchestrator.config.config import Config
from orchestrator.config.loader import changed, config_from_tree, load_config
from orchestrator.errors import CapacityError, ConfigError
from orchestrator.planning.demands import all_demands
from orchestrator.planning.hardware import CPU_CORE

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
ANY = MeanLengths(200.0, 400.0, 0.5)


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out, "width", 220)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    return tmp_path


@pytest.fixture
def tree(folder: Path) -> dict[str, Any]:
    return {
        "model": {"path": str(folder), "dtype": "bfloat16", "max_length": 2048},
        "reward": {"name": "rules", "rules": [{"function": "actors.rewards.gold:vader_positivity"}]},
        "rollout": {"max_new_tokens": 1024},
        "rl": {"steps": 100, "prompts_per_step": 128, "samples_per_prompt": 1},
    }


def config_of(tree: dict[str, Any]) -> Config:
    return config_from_tree(tree, source="the test")


def on(gpus: int | None, kind: str | None = "h100", price: float | None = None) -> Target:
    return Target(gpus, kind, None, price, None)


def test_a_model_is_measured_by_its_config_alone(folder: Path) -> None:
    size = dimensions(folder, dtype="bfloat16")
    assert (size.num_params, size.kv_width, size.tied) == (8_030_261_248, 1024, False)


def test_a_plan_tells_time_memory_and_money_and_proposes_a_config(
    tree: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    plan(config_of(tree), on(32), ANY)
    text = capsys.readouterr().out
    assert "8.03 billion parameters; a step: 128 samples, prompts of 200, responses of 400 tokens" in text
    assert "plan: 32 × h100, 8 a node" in text
    assert re.search(r"memory of a GPU of .*rollout, of 74.5 GiB, KV cache [\d.]+ GiB:\n  ", text)
    (best,) = re.findall(r"^best: (.*)$", text, re.MULTILINE)
    assert load_config(None, [*best.split(), "reward.path=any"]).policy.ranks > 1


def test_a_price_sets_the_money(tree: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    plan(config_of(tree), on(32, "h200", price=1000.0), ANY)
    assert re.search(r"│ \d+,\d{3} +│$", capsys.readouterr().out, re.MULTILINE)


def test_what_does_not_fit_is_said_and_is_an_error_when_nothing_does(
    tree: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CapacityError, match="nothing fits"):
        plan(config_of(tree), on(1), ANY)
    text = capsys.readouterr().out
    assert "does not fit: colocated, 1 engines of 1: policy, critic, reference, rollout on one h100" in text
    assert re.search(r"usable [\d.]+ GiB\.\s+Use\s", text)


def test_gpus_of_no_known_kind_are_asked_for(tree: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--gpu-kind"):
        plan(config_of(tree), on(8, None), ANY)


def test_without_gpus_the_config_is_planned_as_it_is(
    tree: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    small = {**LLAMA_8B, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
    (Path(tree["model"]["path"]) / "config.json").write_text(json.dumps({**small, "num_attention_heads": 8}))
    plan(config_of({**tree, "rollout": {"max_new_tokens": 1024, "cpus_per_replica": 1}}), on(None, None), ANY)
    text = capsys.readouterr().out
    assert "plan: this machine" in text and "colocated, 1 engines of 1" in text


def test_lengths_are_the_longest_unless_they_are_told(tree: dict[str, Any]) -> None:
    work = work_of(config_of(tree), prompt_tokens=None, response_tokens=None, deviation=0.5)
    _, responses = work.lengths(0)
    assert (responses == 1024).all()


def test_the_layout_of_a_config_has_its_actors(tree: dict[str, Any]) -> None:
    config = config_of({**tree, "rollout": {"max_new_tokens": 64, "replicas": 3}, "placement": {"mode": "separate"}})
    layout = layout_of(config, CPU_CORE, 64)
    assert (layout.engines, layout.width("rollout"), layout.devices_of("rollout")) == (3, 2, 6)
    assert not layout.takes_turns
    assert layout_of(config_of(tree), CPU_CORE, 2).takes_turns


def test_a_bad_config_ends_with_exit_code_2(tree: dict[str, Any], tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(command.main)
    runner = CliRunner()
    assert runner.invoke(app, ["rl.stepz=3"]).exit_code == 2
    model = f"model.path={tree['model']['path']}"
    assert runner.invoke(app, ["--gpus", "1", "--gpu-kind", "abacus", model, "reward.path=x"]).exit_code == 2


def test_greedy_samples_and_further_rounds_are_counted_and_told(
    tree: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    rl = {"steps": 100, "prompts_per_step": 32, "samples_per_prompt": 4}
    rollout = {"max_new_tokens": 1024, "samples_per_shard": 60}
    remax = config_of({**tree, "rl": rl, "algorithm": {"name": "remax"}, "rollout": rollout})
    plan(remax, on(32), ANY)
    assert "and 32 greedy samples a step, which are scored and not learned from" in capsys.readouterr().out
    dapo = config_of({**tree, "rl": rl, "algorithm": {"name": "dapo"}})
    plan(dapo, on(32), ANY)
    told = "dynamic sampling: 1 further rounds of 128 samples a step, if 50% of the prompts are kept (--kept)"
    assert told in capsys.readouterr().out
    means = {"prompt_tokens": 200.0, "response_tokens": 400.0, "deviation": 0.5}
    assert [work_of(dapo, **means, kept=kept).rounds for kept in (1.0, 0.5, 0.3, 0.1)] == [0, 1, 3, 3]
    assert (work_of(remax, **means).scored, work_of(remax, **means).rounds) == (160, 0)


LORA = {"policy": {"lora": {"rank": 16}}, "critic": {"lora": {"rank": 8, "targets": ["q_proj", "v_proj"]}}}


def test_adapters_are_planned_as_what_they_are(tree: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Parameters: rank × (inputs + outputs) of each layer; q, k, v, o, gate, up and down of Llama-3-8B."""
    layer = (4096 + 4096) * 2 + (4096 + 1024) * 2 + (4096 + 14336) * 3
    plan(config_of({**tree, **LORA}), on(8, "h100"), ANY)
    text = capsys.readouterr().out
    assert f"LoRA of rank 16, scale 2, on all layers: {32 * 16 * layer / 1e6:.1f} million parameters learn" in text
    of_critic = 32 * 8 * (4096 + 4096 + 4096 + 1024) / 1e6
    assert f"LoRA of rank 8, scale 4, on q_proj, v_proj: {of_critic:.1f} million parameters learn" in text
    assert "critic and reference on the policy's trunk: no weights of their own" in text
    (proposal,) = re.findall(r"best: (.*)", text)
    assert "reference." not in proposal and "critic." not in proposal
    assert re.search(r"memory of a GPU of policy(, rollout)?, of 74.5 GiB", text), "one process on the trunk"
    with_adapters, without = map(float, re.findall(r"critic and reference: ([\d.]+) GiB, and ([\d.]+) GiB", text)[0])
    assert with_adapters < 0.1 * without


def test_a_quantised_trunk_is_planned_with_its_bits(tree: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for bits in (None, 4):
        lora = {"rank": 16, "trunk_bits": bits}
        plan(config_of({**tree, "policy": {"lora": lora}, "critic": {"lora": lora}}), on(8, "h100"), ANY)
        text = capsys.readouterr().out
        found.append(float(re.findall(r"critic and reference: ([\d.]+) GiB, and", text)[0]))
    assert "of a trunk in 4 bits" in text
    quantised = 32 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 4096 * 14336 * 3)
    assert found[0] - found[1] == pytest.approx(quantised * (2 - 0.5 - 4 / 64) / 2**30, abs=0.2)


def test_every_model_among_the_sources_of_a_reward_is_planned(
    tree: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = folder / "small"
    small.mkdir()
    (small / "config.json").write_text(json.dumps({**LLAMA_8B, "hidden_size": 2048, "num_hidden_layers": 16}))
    sources = {
        "one": {"path": str(folder), "micro_batch_tokens": 2048},
        "other": {"path": str(small)},
        "brief": {"name": "rules", "rules": [{"function": "actors.rewards.rules:length_target"}]},
    }
    config = config_of({**tree, "reward": {"name": "weighted", "sources": sources}})
    sizes = [dimensions(each, dtype="bfloat16") for each in (folder, small)]
    found = models_of(config)["reward"]
    assert found is not None and found.num_params == sum(size.num_params for size in sizes)
    assert found.num_layers * found.hidden == sum(size.num_layers * size.hidden for size in sizes)
    memory = memory_per_role(config, _Sizes(config), ["reward"])["reward"]
    assert memory.state == sum(2 * size.num_params for size in sizes)
    plan(config, on(32), ANY)
    (proposal,) = re.findall(r"best: (.*)", capsys.readouterr().out)
    assert "reward.sources.one.micro_batch_tokens=" in proposal and "reward.sources.other.micro" in proposal
    keys = {key: yaml.safe_load(value) for key, value in (setting.split("=") for setting in proposal.split())}
    assert changed(config, keys, source="the plan").reward.replicas == keys["reward.replicas"]


def test_what_chooses_items_for_people_is_the_reward_model_that_the_run_trains(tree: dict[str, Any]) -> None:
    """Also where the run scores by rules."""
    config = config_of({**tree, "people": {"items": 9, "choose": "active"}, "reward_model": {"layers": 8}})
    memory = memory_per_role(config, _Sizes(config), ["states"])["states"]
    whole = dimensions(Path(config.model.path), dtype="bfloat16").num_params
    assert memory.state < whole
    assert memory.state == 2 * _Sizes(config).of(None, 8).num_params


@pytest.mark.parametrize(
    ("changes", "reference", "critic"),
    [
        ({}, True, True),
        ({"policy": {"lora": {"rank": 0}}}, False, False),
        ({"critic": {"lora": {"rank": 0}}}, True, False),
        ({"reference": {"path": "/another"}}, False, True),
        ({"critic": {"lora": {"rank": 8}, "path": "/another"}}, True, False),
        ({"policy": {"lora": {"rank": 8}, "zero_stage": 3}}, True, False),
        ({"reward": {"name": "model", "path": "/reward"}}, True, False),
        ({"reward": {"name": "weighted", "sources": {"one": {"path": "/reward"}}}}, True, False),
        ({"policy": {"lora": {"rank": 8, "trunk_bits": 4}}}, True, False),
        ({"algorithm": {"name": "grpo"}, "rl": {"prompts_per_step": 64, "samples_per_prompt": 2}}, True, False),
    ],
)
def test_roles_share_the_trunk_where_they_start_from_it(
    tree: dict[str, Any], changes: dict[str, Any], reference: bool, critic: bool
) -> None:
    config = config_of({**tree, **LORA, **changes})
    assert (config.reference_is_trunk, config.critic_is_on_trunk) == (reference, critic)
    roles = {demand.role for demand in all_demands(config)}
    assert ("reference" in roles) is not reference
    assert ("critic" in roles) is (config.algorithm.needs_critic and not critic)
