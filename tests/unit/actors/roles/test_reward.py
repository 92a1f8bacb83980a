"""The reward role returns schema.REWARDS for each kind of source."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from actors.rewards import DISAGREEMENT, RewardContext, Score
from actors.rewards.model import write_stats
from actors.roles.reward import RewardWorker, rewards_table
from orchestrator import schema
from orchestrator.config.rewards import (
    HttpRewardConfig,
    ModelRewardConfig,
    RewardConfig,
    RuleConfig,
    RuleLimits,
    RulesRewardConfig,
)
from orchestrator.config.sections import ModelConfig
from orchestrator.errors import ConfigError, DataError
from tests.tiny import tiny_llama, tiny_scorer
from tests.unit.actors.rewards.rollouts import rollout_table

GOLD = RulesRewardConfig(rules=(RuleConfig(function="actors.rewards.gold:vader_positivity"),))


def worker(reward: RewardConfig, policy: Path = Path("none")) -> RewardWorker:
    model = ModelConfig(path=str(policy), dtype="float32")
    return RewardWorker(reward, RewardContext(model, None, policy / "cache", RuleLimits(), total_s=60.0))


def test_rule_scores_come_back_row_by_row() -> None:
    table = worker(GOLD).score(rollout_table(["What a lovely and happy day we had.", ""]))
    assert table.schema == schema.REWARDS
    first, second = table.to_pylist()
    assert first["row"] == 10 and first["reward"] > 0.5 and first["reward_error"] is None
    assert dict(first["reward_parts"]) == {"vader_positivity": first["reward"]}
    assert (second["row"], second["reward"]) == (11, -1.0)


def test_failures_are_null_with_their_reason() -> None:
    scores = [
        Score(1.0, {"a": 1.0}),
        Score(None, error="why"),
        Score(1e39),
        Score(float("nan")),
        Score(0.0, {"a": -1e39}),
    ]
    table = rewards_table(pa.chunked_array([pa.array(range(5), pa.int32())]), scores)
    table.validate(full=True)
    assert table["reward"].to_pylist() == [1.0, None, None, None, None]
    errors = table["reward_error"].to_pylist()
    assert errors[:2] == [None, "why"] and all("not a finite 32-bit number" in error for error in errors[2:])
    assert table["reward_parts"].to_pylist() == [[("a", 1.0)], [], [], [], []]


def test_an_empty_table_gives_an_empty_table() -> None:
    table = worker(GOLD).score(rollout_table([]))
    assert table.num_rows == 0 and table.schema == schema.REWARDS


def test_a_model_scores_with_the_statistics_it_was_saved_with(tmp_path: Path) -> None:
    scorer, policy = tiny_scorer(tmp_path / "scorer"), tiny_llama(tmp_path / "policy")
    reward = ModelRewardConfig(path=str(scorer))
    with pytest.raises(DataError, match=r"no reward_stats\.json"):
        worker(reward, policy)
    write_stats(scorer, [-1.0, 1.0])
    rollout = rollout_table(["x", "y"], prompt_tokens=[[5, 6], [7]], response_tokens=[[8, 0], [9, 10]])
    for row in worker(reward, policy).score(rollout).to_pylist():
        assert row["reward"] == pytest.approx(dict(row["reward_parts"])["model"] / 2**0.5)


def test_the_disagreement_of_heads_is_written_beside_the_reward(tmp_path: Path) -> None:
    scorer, policy = tiny_scorer(tmp_path / "scorer", heads=3), tiny_llama(tmp_path / "policy")
    write_stats(scorer, [-1.0, 1.0])
    rollout = rollout_table(["x", "y"], prompt_tokens=[[5, 6], [7]], response_tokens=[[8, 0], [9, 10]])
    found = worker(ModelRewardConfig(path=str(scorer)), policy).score(rollout)
    for row in found.to_pylist():
        parts = dict(row["reward_parts"])
        assert row["reward"] == pytest.approx(parts["model"] / 2**0.5)
        assert list(parts) == ["model", DISAGREEMENT] and parts[DISAGREEMENT] > 1e-3


def test_a_kind_says_what_it_lacks() -> None:
    with pytest.raises(ConfigError, match=r"reward\.path"):
        worker(ModelRewardConfig())
    with pytest.raises(ConfigError, match="must start with http"):
        worker(HttpRewardConfig(url="nowhere"))
