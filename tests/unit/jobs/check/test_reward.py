"""An external reward model uses its maximum length; cuts are reported before a run starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.check.rewards import check_reward_window
from jobs.stages.settings import reward_max_length
from jobs.stages.stage import Found
from orchestrator.config.config import Config
from orchestrator.config.loader import config_from_tree
from orchestrator.errors import ConfigError
from orchestrator.watching.telemetry import Telemetry
from tests.tiny import tiny_llama, tiny_scorer


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_scorer(tmp_path_factory.mktemp("scorer"))


def window_of(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["max_position_embeddings"])


def window_note(config: Config) -> str | None:
    return check_reward_window(config, Found(None, None, None))


def config_of(cache: Path, reward: dict[str, Any], **sections: Any) -> Config:
    return config_from_tree({"run": {"cache": str(cache)}, "reward": reward, **sections}, source="test")


def test_the_length_is_the_keys_else_the_stages_else_the_models_own(tmp_path: Path) -> None:
    trained = {"stages": ["reward_model", "rl"], "preferences": {"path": "x"}, "reward_model": {"max_length": 100}}
    assert reward_max_length(config_of(tmp_path, {}, **trained)) == 100
    assert reward_max_length(config_of(tmp_path, {"max_length": 90}, **trained)) == 90
    assert reward_max_length(config_of(tmp_path, {"path": "x"}, reward_model={"max_length": 100})) is None
    assert reward_max_length(config_of(tmp_path, {"path": "x", "max_length": 700})) == 700


def test_a_model_whose_window_holds_a_transcript_needs_no_word(scorer: Path, tmp_path: Path) -> None:
    longest = {"model": {"max_length": window_of(scorer)}}
    assert window_note(config_of(tmp_path, {"path": str(scorer)}, **longest)) is None


def test_what_will_be_cut_is_said(scorer: Path, tmp_path: Path) -> None:
    longer = {"model": {"path": str(scorer), "max_length": window_of(scorer) + 1}}
    note = window_note(config_of(tmp_path, {"path": str(scorer)}, **longer))
    assert note is not None and f"takes the last {window_of(scorer)} tokens" in note and "reward/cut" in note
    note = window_note(config_of(tmp_path, {"path": str(scorer), "max_length": 40}, **longer))
    assert note is not None and "takes the last 40 tokens" in note


def test_the_model_that_the_run_trains_is_told_of_too(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    sections = {"stages": ["reward_model", "rl"], "preferences": {"path": "x"}, "reward_model": {"max_length": 30}}
    model = {"path": str(base), "max_length": 128}
    note = window_note(config_of(tmp_path, {}, model=model, **sections))
    assert note is not None and "takes the last 30 tokens" in note


def test_more_than_the_window_is_refused_with_the_way_out(scorer: Path, tmp_path: Path) -> None:
    there = window_of(scorer)
    with pytest.raises(ConfigError, match=rf"reward\.max_length={there + 1} exceeds .* Set reward\.max_length={there}"):
        window_note(config_of(tmp_path, {"path": str(scorer), "max_length": there + 1}))


def test_a_step_with_cut_transcripts_says_so_in_its_line(tmp_path: Path) -> None:
    said: list[str] = []
    telemetry = Telemetry(tmp_path, "run", 1, console=said.append)
    for cut in (0.0, 3.0):
        with telemetry.step(int(cut)) as record:
            record({"reward/mean": 0.5, "reward/cut": cut})
    assert "cut" not in said[0] and "3 transcripts cut for the reward model" in said[1]
