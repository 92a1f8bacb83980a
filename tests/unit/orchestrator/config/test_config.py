"""Contradicting keys are refused, and the error names both and a remedy."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from jobs.stages.table import stages_of
from orchestrator.config.base import by_name, by_name_in_mapping
from orchestrator.config.config import Config
from orchestrator.config.loader import config_from_tree, load_config
from orchestrator.errors import ConfigError

GROUPS = {"name": "grpo"}
SHIPPED = Path(__file__).parents[4] / "jobs" / "configs"
TO_GIVE = {
    "hh_rlhf": ["preferences.path=FILE"],
    **dict.fromkeys(("instruct_gpt", "zephyr", "chinese"), ["preferences.path=FILE", "demonstrations.path=FILE"]),
}
NUM_KEYS, MOST_KEYS = 240, 250


def config(**sections: Any) -> Config:
    return config_from_tree({"reward": {"path": "/models/reward"}, **sections}, source="test")


ON_GPUS: dict[str, Any] = {"policy": {"gpus_per_rank": 1}, "rollout": {"gpus_per_replica": 1}}


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"rl": {"max_staleness": 1}, "algorithm": {"importance_cap": 2.0}}, r"needs rl\.max_staleness=0, got 1"),
        (
            {"rl": {"max_staleness": 1}, "placement": {"mode": "separate"}},
            r"rl\.max_staleness=1 needs algorithm\.importance_cap",
        ),
        ({"rl": {"prompts_per_step": 5}, "algorithm": {"minibatches": 4}}, r"10 samples .* sizes: 8 and 12 samples"),
        ({"rl": {"samples_per_prompt": 1}, "algorithm": GROUPS}, r"at least two, got rl\.samples_per_prompt=1"),
        (
            {"rl": {"samples_per_prompt": 3}, "rollout": {"samples_per_shard": 64}, "algorithm": GROUPS},
            r"the 3 samples .* compares\. Set it to 63\.",
        ),
        (
            {"rl": {"prompts_per_step": 6, "samples_per_prompt": 4}, "algorithm": {**GROUPS, "minibatches": 4}},
            r"6 is not divisible by algorithm\.minibatches=4",
        ),
        (
            {"rollout": {"engine": "hf", "tensor_parallel_size": 2}},
            r"tensor_parallel_size=2 needs rollout\.engine=vllm",
        ),
        ({"rollout": {"max_new_tokens": 512}}, r"leaves no room for a prompt in model\.max_length=512"),
        ({"checkpoints": {"best_metric": None, "best_max_kl": 1.0}}, r"needs checkpoints\.best_metric"),
        (
            {"publish": {"transport": "collective"}, "rollout": {"gpus_per_replica": 1}},
            r"the policy is on CPUs, the engines on GPUs",
        ),
        (
            {
                "publish": {"transport": "shared"},
                "policy": {"gpus_per_rank": 1},
            },
            r"the policy is on GPUs, the engines on CPUs",
        ),
        ({"publish": {"transport": "collective"}, **ON_GPUS}, r"NCCL can't serve two processes on one GPU"),
        (
            {"publish": {"transport": "shared"}, **ON_GPUS, "placement": {"mode": "separate"}},
            r"publish\.transport=shared needs placement\.mode=colocated",
        ),
        ({"guards": {"failed_rewards": {"max": 0.2}}}, r"stops above reward\.max_failed_fraction=0\.1"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(sections: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        config(**sections)


def test_a_shard_may_part_samples_that_are_not_compared() -> None:
    assert config(rl={"samples_per_prompt": 3}, rollout={"samples_per_shard": 64}).rl.samples_per_prompt == 3


@pytest.mark.parametrize("section", ["policy", "critic", "sft", "reward_model", "preference"])
@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"offload_optimizer": True}, "optimizer=true needs GPUs, and .*gpus_per_rank is 0"),
        ({"liger": True}, "iger=true needs GPUs"),
        ({"offload_optimizer": True, "gpus_per_rank": 1, "zero_stage": 0}, "Set .*zero_stage=1 or higher"),
        ({"zero_hpz_partition_size": 2, "ranks": 4}, "only stage 3 gathers"),
        ({"zero_hpz_partition_size": 4, "ranks": 6, "zero_stage": 3}, "does not divide .*ranks=6"),
        ({"lora": {"alpha": 64}}, "lora.alpha=64.0 needs adapters, and .*lora.rank is 0"),
        ({"lora": {"targets": ["q_proj"]}}, "lora.targets=.*needs adapters"),
        ({"lora": {"dora": True}}, "lora.dora=True needs adapters"),
        ({"lora": {"rank_stabilised": True}}, "lora.rank_stabilised=True needs adapters"),
    ],
)
def test_settings_of_learners_that_have_no_effect_are_refused(
    section: str, keys: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=rf"{section}\..*{complaint}"):
        config(**{section: keys})
    config(**{section: {"offload_optimizer": True, "liger": True, "gpus_per_rank": 1, "zero_stage": 2}})


@pytest.mark.parametrize("name", [path.stem for path in SHIPPED.glob("*.yaml") if path.stem != "kustomization"])
def test_a_shipped_config_is_read_and_its_stages_fit_together(name: str) -> None:
    assert stages_of(load_config(SHIPPED / f"{name}.yaml", TO_GIVE.get(name, [])))


def declared_keys(section: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """(section that declares it, key): a key that several sections inherit or contain counts once."""
    for name, field in section.model_fields.items():
        choice = by_name(field) or by_name_in_mapping(field)
        inner = list(_sections_in(field.annotation))
        for kind in choice.table.values() if choice else inner:
            yield from declared_keys(kind)
        if not inner:
            owner = next(base for base in reversed(section.__mro__) if name in vars(base).get("__annotations__", {}))
            yield owner.__name__, name


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _sections_in(part)


def test_the_keys_are_counted() -> None:
    """Keeps the number of keys to learn manageable. A new key raises NUM_KEYS; one that replaces two lowers it."""
    found = set(declared_keys(Config))
    assert {("RuleConfig", "function"), ("EndpointConfig", "url"), ("Ppo", "gamma"), ("KlGuardConfig", "max")} <= found
    assert len(found) == NUM_KEYS <= MOST_KEYS
