"""Changes of a resumed run: keys that do not affect results may change; all others matter."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.config.changes import changed_keys
from orchestrator.config.config import Config


def config(**sections: Any) -> Config:
    return Config.model_validate({"reward": {"path": "/models/reward"}, **sections})


def test_equal_configs_have_no_changes() -> None:
    assert changed_keys(config(), config()) == ()


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ({}, {"deadlines": {"learn_s": 60}}, "deadlines.learn_s: 3600.0 -> 60.0"),
        ({}, {"telemetry": {"wandb_project": "p"}}, 'telemetry.wandb_project: null -> "p"'),
        ({}, {"guards": {"kl": {"max": 3}}}, "guards.kl.max: null -> 3.0"),
        ({}, {"placement": {"wait_s": 60}}, "placement.wait_s: 20.0 -> 60.0"),
        ({}, {"checkpoints": {"keep": 5}}, "checkpoints.keep: 2 -> 5"),
        ({}, {"evaluation": {"every_steps": 5}}, "evaluation.every_steps: 0 -> 5"),
        ({}, {"run": {"id": "demo-1"}}, 'run.id: null -> "demo-1"'),
        ({}, {"rollout": {"replicas": 2}}, "rollout.replicas: 1 -> 2"),
        ({"rl": {"steps": 3}}, {"rl": {"steps": 6}}, "rl.steps: 3 -> 6"),
    ],
)
def test_what_computes_nothing_does_not_matter(old: dict[str, Any], new: dict[str, Any], text: str) -> None:
    (change,) = changed_keys(config(**old), config(**new))
    assert (str(change), change.matters) == (text, False)


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ({}, {"stages": ["sample", "preferences", "reward_model", "rl"]}, "stages"),
        ({}, {"run": {"seed": 2}}, "run.seed"),
        ({}, {"policy": {"learning_rate": 1e-4}}, "policy.learning_rate"),
        ({}, {"policy": {"cpus_per_rank": 2}}, "policy.cpus_per_rank"),
        ({}, {"rollout": {"cpus_per_replica": 4}}, "rollout.cpus_per_replica"),
        ({}, {"placement": {"mode": "separate"}}, "placement.mode"),
        ({}, {"evaluation": {"prompts": 4}}, "evaluation.prompts"),
        ({"rl": {"steps": 6}}, {"rl": {"steps": 3}}, "rl.steps"),
        (
            {"rl": {"steps": 3}, "critic": {"schedule": "linear"}},
            {"rl": {"steps": 6}, "critic": {"schedule": "linear"}},
            "rl.steps",
        ),
        (
            {"rollout": {"reproducible": False}},
            {"rollout": {"reproducible": False, "replicas": 2}},
            "rollout.replicas",
        ),
        ({}, {"reward": {"path": "/models/other"}}, "reward.path"),
    ],
)
def test_what_changes_what_is_computed_matters(old: dict[str, Any], new: dict[str, Any], key: str) -> None:
    (change,) = changed_keys(config(**old), config(**new))
    assert (change.key, change.matters) == (key, True)


def test_another_kind_of_reward_is_listed_key_by_key() -> None:
    changes = changed_keys(config(), config(reward={"name": "http", "url": "http://h/score"}))
    assert 'reward.url: null -> "http://h/score"' in map(str, changes)
    assert 'reward.path: "/models/reward" -> null' in map(str, changes)
    assert all(change.matters for change in changes)
