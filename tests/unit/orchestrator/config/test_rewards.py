"""The reward is a section selected by name; old keys are explained to users and translated for kept runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.config.config import Config
from orchestrator.config.loader import config_from_tree, load_config, load_kept_config, to_yaml
from orchestrator.config.rewards import (
    REWARDS,
    HttpRewardConfig,
    ModelRewardConfig,
    RuleConfig,
    RulesRewardConfig,
    WeightedRewardConfig,
)
from orchestrator.errors import ConfigError

RULES = [{"function": "a.b:c"}]
KEPT: dict[str, Any] = {
    "kind": "rules",
    "path": None,
    "rules": [{"function": "a.b:c", "weight": 2.0}],
    "limits": {"call_s": 7.0, "import_s": 60.0, "memory_gib": None, "processes": 64},
    "http": None,
    "replicas": 3,
    "micro_batch_tokens": 4096,
    "max_length": None,
    "normalise": True,
    "clip": 5.0,
    "max_failed_fraction": 0.1,
    "cpus_per_replica": 1.0,
    "gpus_per_replica": 0.0,
}


def config(**sections: Any) -> Config:
    return config_from_tree(sections, source="test")


def test_without_a_name_it_is_a_model() -> None:
    assert config(reward={"path": "/m"}).reward == ModelRewardConfig(path="/m")


@pytest.mark.parametrize(
    "reward",
    [
        {"path": "/m"},
        {"name": "rules", "rules": RULES},
        {"name": "http", "url": "http://h"},
        {"name": "judge", "url": "http://h/v1", "model": "m", "score_range": [1, 5]},
    ],
)
def test_a_config_is_written_and_read_back_whole(reward: dict[str, Any]) -> None:
    first = config(reward=reward)
    assert config_from_tree(yaml.safe_load(to_yaml(first)), source="test") == first


def test_every_section_bears_the_name_that_it_is_chosen_by() -> None:
    assert {name: section.model_fields["name"].default for name, section in REWARDS.items()} == {
        name: name for name in REWARDS
    }


@pytest.mark.parametrize(
    ("reward", "problem"),
    [
        (
            {"name": "rules", "rules": RULES, "url": "http://h"},
            r"'reward.url': it is legal only with reward.name=http or judge",
        ),
        ({"name": "rules", "rules": RULES, "rule": []}, r"did you mean 'reward.rules'"),
        ({"name": "rules"}, r"reward\.rules is required: Rule functions, such as \[{function: "),
        ({"name": "rules", "rules": []}, r"reward.rules"),
        ({"name": "http"}, r"reward\.url is required: Endpoint: POST"),
        ({"name": "rules", "rules": [{}]}, r"reward\.rules\.0\.function is required: Dotted name"),
        (
            {"name": "rulez", "rules": RULES},
            r"reward.name: must be one of model, rules, http, judge, environment, weighted, got 'rulez'",
        ),
        ({"name": ["rules"]}, r"reward.name"),
        ("rules", r"reward: "),
    ],
)
def test_a_key_of_another_kind_or_one_that_is_missing_is_named(reward: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        config(reward=reward)


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"reward": {"kind": "rules"}}, "reward.kind is now called reward.name"),
        ({"reward": {"http": {"url": "http://h"}}}, "reward.http.url is now called reward.url"),
        ({"reward": {"limits": {"call_s": 3}}}, "reward.limits.call_s is now called rule_limits.call_s"),
        ({"rollout": {"engines": 2}}, "rollout.engines is now called rollout.replicas"),
        ({"reference": {"replicas": 2}}, "reference.replicas is now called reference.ranks"),
        ({"reward_model": {"workers": 2}}, "reward_model.workers is now called reward_model.ranks"),
    ],
)
def test_an_old_key_is_told_its_new_name(sections: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        config(**sections)


def kept(folder: Path, **sections: Any) -> Config:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(sections))
    return load_kept_config(file)


def test_the_rules_of_a_run_from_before_are_read(tmp_path: Path) -> None:
    found = kept(tmp_path, reward=KEPT)
    rules = (RuleConfig(function="a.b:c", weight=2.0),)
    assert found.reward == RulesRewardConfig(rules=rules, replicas=3, clip=5.0)
    assert (found.rule_limits.call_s, found.rule_limits.memory_gib) == (7.0, None)


def test_the_model_of_a_run_from_before_is_read(tmp_path: Path) -> None:
    old = {**KEPT, "kind": "model", "rules": [], "path": "/m", "max_length": 90}
    assert kept(tmp_path, reward=old).reward == ModelRewardConfig(path="/m", max_length=90, replicas=3, clip=5.0)


def test_the_endpoint_of_a_run_from_before_is_read(tmp_path: Path) -> None:
    http = {"url": "http://h", "timeout_s": 3.0, "retries": 1, "token_from": None}
    found = kept(tmp_path, reward={**KEPT, "kind": "http", "rules": [], "http": http})
    assert found.reward == HttpRewardConfig(url="http://h", timeout_s=3.0, retries=1, replicas=3, clip=5.0)


def test_the_counts_of_a_run_from_before_are_read(tmp_path: Path) -> None:
    found = kept(
        tmp_path,
        reward={"path": "/m"},
        rollout={"engines": 2, "cpus_per_engine": 3.0, "gpus_per_engine": 0.5},
        reference={"replicas": 4, "cpus_per_replica": 2.0},
        reward_model={"workers": 2, "threads_per_worker": None, "gpus_per_worker": 1.0},
    )
    assert (found.rollout.replicas, found.rollout.cpus_per_replica, found.rollout.gpus_per_replica) == (2, 3.0, 0.5)
    assert (found.reference.ranks, found.reference.cpus_per_rank) == (4, 2.0)
    assert (found.reward_model.ranks, found.reward_model.cpus_per_rank) == (2, None)
    assert found.reward_model.gpus_per_rank == 1.0


def test_the_way_out_of_keys_of_another_kind_works(tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"reward": {"name": "rules", "rules": RULES}}))
    with pytest.raises(ConfigError, match=r"'reward\.rules': .* reward=\{name: \.\.\.\} replaces"):
        load_config(file, ["reward.name=http", "reward.url=http://h"])
    assert load_config(file, ["reward={name: http, url: 'http://h'}"]).reward == HttpRewardConfig(url="http://h")


@pytest.mark.parametrize(
    ("tree", "problem"),
    [
        ({"reward": {"sources": {}}}, r"reward\.sources: .* at least 1"),
        ({"reward": {"sources": {"a": {"wieght": 2}}}}, r"'reward\.sources\.a\.wieght'; did you mean .*a\.weight'"),
        (
            {"reward": {"sources": {"a": {"name": "rules", "rules": RULES, "path": "/m"}}}},
            r"'reward\.sources\.a\.path': it is legal only with reward\.sources\.a\.name=model",
        ),
        ({"reward": {"sources": {"a": {"path": "/m", "replicas": 2}}}}, r"unknown key 'reward\.sources\.a\.replicas'"),
        ({"reward": {"sources": {"a.b": {"path": "/m"}}}}, r"should match pattern"),
        ({"reward": {"sources": {"a": {}, "b": {}}}}, r"sources\.a and reward\.sources\.b have no path"),
        (
            {"reward": {"sources": {"a": {"name": "environment"}}}},
            r"sources\.a\.name='environment' needs an env",
        ),
        (
            {
                "reward": {"sources": {"a": {"path": "/m", "standardise": "shard"}}},
                "algorithm": {"name": "gdpo", "part_weights": {"a": 1.0}},
                "rl": {"prompts_per_step": 16, "samples_per_prompt": 2},
            },
            r"gdpo standardises .* reward\.sources\.a\.standardise would not be used",
        ),
        (
            {
                "reward": {"sources": {"a": {"path": "/m"}}, "clip": 2.0},
                "algorithm": {"name": "gdpo", "part_weights": {"a": 1.0}},
                "rl": {"prompts_per_step": 16, "samples_per_prompt": 2},
            },
            r"reward\.clip=2 clips the whole reward, of which algorithm\.name=gdpo compares only parts",
        ),
        (
            {"reward": {"sources": {"a": {"name": "http", "url": "http://me:secret@host/"}}}},
            r"in reward\.sources\.a\.token_from",
        ),
    ],
)
def test_sources_that_do_not_fit_are_refused_by_their_names(tree: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        config_from_tree({**tree, "reward": {"name": "weighted", **tree["reward"]}}, source="test")


def test_a_key_of_a_source_can_be_set_on_the_command_line() -> None:
    keys = ["reward.name=weighted", "reward.sources.a.path=/m", "reward.sources.a.weight=0.25"]
    reward = load_config(None, keys).reward
    assert isinstance(reward, WeightedRewardConfig) and reward.sources["a"].weight == 0.25
    assert config_from_tree({"reward": reward.model_dump(mode="json")}, source="test").reward == reward
