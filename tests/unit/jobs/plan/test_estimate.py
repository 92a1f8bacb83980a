"""Estimates the duration of a run from sizes and the machine's speed, without a model's weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.machine.node_speeds import complaints
from actors.machine.probe import Speed
from jobs.plan import estimate as module
from jobs.plan.estimate import Costs, estimate, expected
from jobs.prepare import Prepared, without_prompts
from jobs.stages.preference import Preference
from jobs.stages.reward_model import RewardModel
from jobs.stages.rl import Rl
from jobs.stages.sample import Sample
from jobs.stages.stage import RowSizes
from orchestrator.config.config import Config
from orchestrator.config.loader import load_config
from orchestrator.planning.hardware import cpu_core
from orchestrator.prompts import Splits
from orchestrator.types import Prompt

QUICKSTART = Path(__file__).resolve().parents[4] / "jobs" / "configs" / "quickstart.yaml"
AVX2 = Speed("Zen 3, AVX2, 2 threads", threads=2, bfloat16=1e9, float32=129e9)
AMX = Speed("AMX, 2 threads", threads=2, bfloat16=1920e9, float32=275e9)
SMOLLM = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda speed: monkeypatch.setattr(module, "machine_speed", lambda cache: speed)


@pytest.fixture
def prepared() -> Prepared:
    chat: Any = None
    return replace(without_prompts(chat), prompts=Splits(prompts(317), prompts(314), prompts(139)))


def prompts(count: int) -> tuple[Prompt, ...]:
    return tuple(Prompt(str(i), "", np.zeros(24, dtype=np.int32)) for i in range(count))


def quickstart(tmp_path: Path, dtype: str, *overrides: str) -> Config:
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM))
    return load_config(QUICKSTART, [f"model.path={tmp_path}", f"model.dtype={dtype}", *overrides])


@pytest.mark.parametrize(("speed", "minutes"), [(AVX2, 15), (AMX, 8)])
def test_the_quickstart_is_sized_for_laptops(
    tmp_path: Path, machine: Any, prepared: Prepared, speed: Speed, minutes: int
) -> None:
    machine(speed)
    found = estimate(quickstart(tmp_path, speed.dtype), prepared)
    assert 60.0 < found.seconds < 60.0 * minutes
    assert set(found.parts) == {"ray", "sample", "preferences", "reward_model", "rl"}


def test_more_work_takes_longer(tmp_path: Path, machine: Any, prepared: Prepared) -> None:
    machine(AVX2)

    def seconds(*overrides: str) -> dict[str, float]:
        return dict(estimate(quickstart(tmp_path, "float32", *overrides), prepared).parts)

    config = quickstart(tmp_path, "float32")
    start = seconds()
    twice = seconds(f"rl.steps={2 * config.rl.steps}", f"reward_model.epochs={2 * config.reward_model.epochs}")
    assert twice["sample"] == start["sample"] > Sample.start_s
    assert twice["reward_model"] > 1.5 * start["reward_model"] - RewardModel.start_s
    evaluations = 2 * start["rl"] - twice["rl"]  # and the start, which further steps do not repeat
    assert Rl.start_s < evaluations < start["rl"]
    whole = seconds("reward_model.layers=null")
    assert whole["reward_model"] - RewardModel.start_s > 4.0 * (start["reward_model"] - RewardModel.start_s)
    assert whole["rl"] > start["rl"]
    with_critic = seconds("reward_model.layers=null", "algorithm.name=ppo")
    assert with_critic["rl"] > 1.3 * whole["rl"]
    assert set(seconds("stages=[sample,preferences]")) == {"ray", "sample", "preferences"}


def test_a_busy_machine_is_told(tmp_path: Path, machine: Any, prepared: Prepared, monkeypatch: Any) -> None:
    machine(AVX2)
    monkeypatch.setattr(module, "prepare", lambda config: prepared)
    config = quickstart(tmp_path, "float32")
    monkeypatch.setattr(module.os, "getloadavg", lambda: (0.2, 0.0, 0.0))
    quiet = expected(config)
    assert quiet.startswith("model.dtype=float32: Zen 3, AVX2, 2 threads: bf16 1 GFLOP/s, fp32 129\nthis takes about ")
    assert "longer" not in quiet
    monkeypatch.setattr(module.os, "getloadavg", lambda: (9.6, 0.0, 0.0))
    assert expected(config) == f"{quiet}; 10 processes compute here now, so it will take longer"


def test_nodes_of_another_kind_are_told_with_the_way_out() -> None:
    found = complaints("bfloat16", {"10.0.0.1": AMX, "10.0.0.2": AVX2})
    assert len(found) == 1
    assert "node 10.0.0.2 is of another kind (Zen 3, AVX2, 2 threads" in found[0]
    assert "model.dtype=float32" in found[0]
    assert complaints("float32", {"10.0.0.2": AVX2}) == []


def test_adapters_save_a_third_of_a_training(tmp_path: Path, machine: Any, prepared: Prepared) -> None:
    """No gradients of frozen weights: two thirds of the FLOPs. Scoring, and traffic of memory, come on top."""
    machine(AMX)
    device = replace(cpu_core("bfloat16", AMX.per_core("bfloat16")), bandwidth=1e18, link=1e18)
    rows = RowSizes(400, np.full(400, 100, dtype=np.int64), 0.5)
    kinds = ("sft", "preference", "reward_model")

    def seconds(*overrides: str) -> list[float]:
        costs = Costs(quickstart(tmp_path, "bfloat16", "reward_model.layers=null", *overrides), device, 2)
        training = [costs._policy_training(stage, rows) for stage in (costs.config.sft, costs.config.preference)]
        return [*training, costs.reward_model(prepared.prompts.reward_model)]

    full, adapted = seconds(), seconds(*(f"{kind}.lora.rank=8" for kind in kinds))
    sft, preference, reward_model = [less / more for less, more in zip(adapted, full, strict=True)]
    assert sft == preference == pytest.approx((2 + 2_442_240 / 134_515_008) / 3)
    assert sft < reward_model < 0.72


def test_a_loss_that_compares_with_a_reference_takes_one_more_forward(
    tmp_path: Path, machine: Any, prepared: Prepared
) -> None:
    machine(AMX)
    stages = ["stages=[sample,preferences,preference]", "preference.max_length=128"]
    seconds = {
        loss: estimate(quickstart(tmp_path, "float32", *stages, f"preference.loss.name={loss}"), prepared).parts[
            Preference.kind
        ]
        for loss in ("dpo", "simpo")
    }
    assert 1.1 < seconds["dpo"] / seconds["simpo"] < 1.5
