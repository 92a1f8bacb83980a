"""Rounds of stages in a config are the same stages, written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.config import Config
from orchestrator.config.loader import config_from_tree, load_kept_config, to_yaml
from orchestrator.errors import ConfigError


def config(*stages: Any) -> Config:
    return config_from_tree({"stages": list(stages)}, source="the test")


def test_rounds_are_written_out_with_numbered_names(tmp_path: Path) -> None:
    own = {"kind": "sft", "set": {"sft.epochs": 2}}
    named = {"name": "more", "kind": "sample"}
    short = config("sft", {"rounds": 2, "stages": ["sample", named, own]}, "evaluate")
    long = config(
        "sft",
        *({**stage, "name": f"{name}-{number}"}
          for number in (1, 2)
          for name, stage in (("sample", {"kind": "sample"}), ("more", named), ("sft", own))),
        "evaluate",
    )  # fmt: skip
    assert short == long
    assert [entry.name for entry in short.stages] == [
        "sft", "sample-1", "more-1", "sft-1", "sample-2", "more-2", "sft-2", "evaluate",
    ]  # fmt: skip
    (tmp_path / "config.yaml").write_text(to_yaml(short))
    assert load_kept_config(tmp_path / "config.yaml") == short


@pytest.mark.parametrize(
    ("rounds", "problem"),
    [
        ({"rounds": 2}, r"have the keys rounds and stages, and no others; got rounds: write \{rounds: 3, stages: \["),
        ({"stages": ["rl"]}, r"got stages: write"),
        ({"rounds": 2, "stages": ["rl"], "set": {}}, r"got rounds, stages, set: write"),
        ({"rounds": 0, "stages": ["rl"]}, r"whole number from 1 on, got 0"),
        ({"rounds": "2", "stages": ["rl"]}, r"whole number from 1 on, got '2'"),
        ({"rounds": True, "stages": ["rl"]}, r"whole number from 1 on, got True"),
        ({"rounds": 2, "stages": []}, r"list of at least one stage, got \[\]"),
        ({"rounds": 2, "stages": "rl"}, r"list of at least one stage, got 'rl'"),
        ({"rounds": 2, "stages": [{"rounds": 2, "stages": ["rl"]}]}, r"rounds can't contain rounds"),
        ({"rounds": 2, "stages": [{"kind": "rl", "sets": {}}]}, r"unknown key 'stages\.0\.sets'; did you mean"),
        ({"rounds": 2, "stages": [{"name": "rl"}]}, r"stages\.0\.kind is required"),
    ],
)
def test_rounds_of_another_form_are_refused_with_the_way_out(rounds: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        config(rounds)
