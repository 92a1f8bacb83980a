"""Rewards of episodes: a failed episode is a failure of its sample, whatever else scores it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.rewards import RewardContext, Score
from actors.rewards.environment import EpisodeReward, WithEpisodes
from actors.rewards.table import build_source
from actors.roles.reward import rewards_table
from orchestrator.config.config import Config
from orchestrator.config.loader import config_from_tree
from orchestrator.config.rewards import EnvironmentRewardConfig, RuleConfig, RuleLimits, RulesRewardConfig
from orchestrator.config.sections import ModelConfig
from orchestrator.errors import ConfigError
from tests.unit.actors.rewards.rollouts import rollout_table

GOOD = {"reward": 1.25, "parts": {"environment.answer": 1.0, "environment.call": 0.25}, "error": None, "spans": []}
BAD = {"reward": None, "parts": {}, "error": "prompt 'p', turn 2: environment e: ValueError: no", "spans": []}
METAS: list[dict[str, Any]] = [{"episode": GOOD}, {"episode": BAD}, {"episode": "a field of the user's data"}, {}]
TABLE = rollout_table(["one two", "one two", "one two", "one two"], metas=METAS)


def test_the_reward_is_the_episodes_and_a_failed_episode_has_none() -> None:
    scores = EpisodeReward().scores(TABLE)
    assert scores[0] == Score(1.25, GOOD["parts"])
    assert (scores[1].value, scores[1].error) == (None, BAD["error"])
    assert [score.value for score in scores[2:]] == [None, None]
    assert all("drawn without an environment" in str(score.error) for score in scores[2:])
    table = rewards_table(TABLE["row"], scores)
    assert table["reward"].to_pylist() == [1.25, None, None, None]
    assert table["reward_error"].to_pylist()[1] == BAD["error"]


def test_beside_another_source_it_is_added() -> None:
    class Source:
        def scores(self, table: Any) -> list[Score]:
            return [Score(2.0, {"model": 2.0}), Score(2.0, {"model": 2.0}), Score(None, error="late"), Score(3.0)]

    scores = WithEpisodes(Source()).scores(TABLE)
    assert scores[0] == Score(3.25, {"model": 2.0, **GOOD["parts"]})
    assert (scores[1].value, scores[1].error) == (None, BAD["error"])
    assert (scores[2].value, scores[2].error) == (None, "late")
    assert scores[3] == Score(3.0)


@pytest.mark.parametrize(("adds", "expected"), [(True, [0.25, None, -1.0, -1.0]), (False, [-1.0] * 4)])
def test_a_configured_source_adds_episodes_only_where_there_is_an_environment(
    adds: bool, expected: list[float | None]
) -> None:
    context = RewardContext(
        policy=ModelConfig(), template=None, cache=Path(), limits=RuleLimits(), total_s=100.0, adds_episodes=adds
    )
    rules = RulesRewardConfig(rules=(RuleConfig(function="actors.rewards.rules:length_target"),))
    target = rollout_table(["one " * 100] * 4, metas=METAS)
    assert [score.value for score in build_source(rules, context).scores(target)] == expected
    assert isinstance(build_source(EnvironmentRewardConfig(), context), EpisodeReward)


def test_the_reward_of_an_environment_needs_one() -> None:
    def config(**sections: Any) -> Config:
        return config_from_tree({"reward": {"name": "environment"}, **sections}, source="test")

    with pytest.raises(ConfigError, match=r"environment\.name is null: name one, such as"):
        config()
    named = config(environment={"name": "actors.environments.calculator:Calculator"})
    assert named.environment.turns() == 4 and Config().environment.turns() == 1
    with pytest.raises(ConfigError, match=r"environment\.name"):
        config(environment={"name": "no colon"})
