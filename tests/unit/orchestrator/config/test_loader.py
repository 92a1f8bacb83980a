"""Sections selected by name, and old keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.algorithms.grpo import Grpo
from orchestrator.algorithms.ppo import Ppo
from orchestrator.algorithms.table import ALGORITHMS
from orchestrator.config.base import by_name
from orchestrator.config.changes import changed_keys, value_of
from orchestrator.config.config import Config
from orchestrator.config.loader import (
    RENAMED,
    RENAMED_VALUES,
    config_from_tree,
    load_config,
    load_kept_config,
    to_yaml,
    translated,
)
from orchestrator.errors import ConfigError

BASE = ("reward.path=/models/reward",)


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as refusal:
        load_config(None, [*BASE, *overrides])
    return str(refusal.value)


def test_the_name_chooses_the_algorithm_and_its_keys() -> None:
    chosen = load_config(None, [*BASE, "algorithm.name=ppo", "algorithm.gamma=0.9"]).algorithm
    assert isinstance(chosen, Ppo) and chosen.gamma == 0.9
    assert isinstance(load_config(None, [*BASE, "algorithm.clip_ratio=0.1"]).algorithm, Ppo), "the default"
    assert load_config(None, [*BASE, "algorithm={name: grpo, clip_ratio: 0.1}"]).algorithm == Grpo(clip_ratio=0.1)


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_a_key_of_another_algorithm_is_refused_and_says_whose_it_is(name: str) -> None:
    message = refused(f"algorithm.name={name}", "algorithm.gamma=0.9")
    assert "unknown key 'algorithm.gamma': it is legal only with algorithm.name=ppo. Remove it;" in message
    assert "algorithm={name: ...} replaces" in message


def test_mistakes_in_a_section_chosen_by_name_are_explained() -> None:
    assert "did you mean 'algorithm.gamma'?" in refused("algorithm.gama=1")
    assert f"algorithm.name: must be one of {', '.join(ALGORITHMS)}, got 'gpro'." in refused("algorithm.name=gpro")
    assert "algorithm.name: must be one of" in refused("algorithm.name=[]")
    assert "algorithm.epochs: " in refused("algorithm.epochs=0")
    assert "algorithm: " in refused("algorithm=3")


def test_a_config_with_another_algorithm_comes_back_whole() -> None:
    config = load_config(None, [*BASE, "algorithm={name: rloo, epochs: 3}"])
    assert config_from_tree(yaml.safe_load(to_yaml(config)), source="again") == config
    assert [str(change) for change in changed_keys(config, load_config(None, [*BASE, "algorithm.name=grpo"]))] == [
        'algorithm.name: "rloo" -> "grpo"',
        "algorithm.epochs: 3 -> 1",
        "algorithm.divide_by_std: null -> true",
    ]


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("dapo", {"clip_ratio_high": 0.28, "filter_rounds": 3, "overlong_fraction": 0.2, "kl_coefficient": 0.0}),
        ("dr-grpo", {"divide_by_std": False, "aggregation": "constant", "kl_coefficient": 0.0}),
        ("gspo", {"clip_ratio": 3e-4, "clip_ratio_high": 4e-4, "aggregation": "sample"}),
        ("cispo", {"clip_ratio": 1.0, "clip_ratio_high": 4.0}),
        ("reinforce++-baseline", {"kl_estimator": "k2-loss"}),
    ],
)
def test_a_name_sets_the_defaults_of_its_paper_and_keys_win(name: str, keys: dict[str, object]) -> None:
    overrides = [*BASE, "rl.samples_per_prompt=4", f"algorithm.name={name}"]
    chosen = load_config(None, overrides).algorithm
    assert {key: getattr(chosen, key) for key in keys} == keys
    assert load_config(None, [*overrides, "algorithm.kl_coefficient=0.3"]).algorithm.kl_coefficient == 0.3


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_key_is_refused_and_the_new_one_named(old: str) -> None:
    assert f"{old} is now called {RENAMED[old]}." in refused(f"{old}=0.5")


def test_an_old_value_is_refused_with_the_new_one() -> None:
    assert "ppo.advantage is now called algorithm.name; write algorithm.name=ppo." in refused("ppo.advantage=gae")


@pytest.mark.parametrize("new", sorted({*RENAMED.values(), *RENAMED_VALUES}))
def test_old_names_lead_to_keys_that_exist(new: str) -> None:
    section, _, key = new.partition(".")
    choice = by_name(Config.model_fields[section])
    holders = choice.table.values() if choice else [type(value_of(load_config(None, BASE), section))]
    assert any(key in holder.model_fields for holder in holders)


# As kept by a run from before the sections `rl` and `algorithm`: with the keys of all algorithms.
KEPT: dict[str, Any] = {
    "run": {"contents": {"model.path": "1a2b"}},
    "reward": {"path": "/models/reward"},
    "ppo": {
        "steps": 7,
        "advantage": "grpo",
        "gamma": 1.0,
        "lam": 0.95,
        "whiten_advantages": True,
        "clip_value": 0.2,
        "clip_ratio": 0.3,
        "kl_target": 6.0,
        "target_kl": 0.1,
        "max_staleness": 0,
    },
}


def test_a_kept_config_with_old_keys_is_translated(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(KEPT))
    config = load_kept_config(file)
    assert config.rl.steps == 7
    assert config.algorithm == Grpo(clip_ratio=0.3, adaptive_kl_target=6.0, early_stop_kl=0.1)
    assert config.run.contents == {"model.path": "1a2b"}, "a key with a dot stays one key"


def test_a_kept_config_with_gae_becomes_ppo() -> None:
    kept = {**KEPT, "ppo": {**KEPT["ppo"], "advantage": "gae", "gamma": 0.9}}
    algorithm = config_from_tree(translated(kept), source="kept").algorithm
    assert isinstance(algorithm, Ppo) and algorithm.gamma == 0.9
    assert kept["ppo"]["advantage"] == "gae", "the given tree is unchanged"


def test_translating_leaves_a_config_of_today_as_it_is() -> None:
    tree = yaml.safe_load(to_yaml(load_config(None, BASE)))
    assert translated(tree) == tree


@pytest.mark.parametrize("damaged", [{"ppo": 3}, {"ppo": None}, {"algorithm": 5}, {"algorithm": {"name": []}}, {}])
def test_translating_a_damaged_config_changes_nothing(damaged: dict[str, Any]) -> None:
    assert translated(damaged) == damaged


def test_an_old_key_whose_new_section_is_damaged_is_left_out() -> None:
    assert translated({"ppo": {"steps": 3}, "rl": 4}) == {"rl": 4}
