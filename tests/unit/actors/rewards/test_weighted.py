"""Several sources with weights: sums by hand, errors that name the source, and what is asked at the same time."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from actors.rewards import RewardContext, RewardSource, Score
from actors.rewards.table import build_source
from actors.rewards.weighted import Weighted, WeightedReward
from orchestrator.config.loader import config_from_tree
from orchestrator.config.rewards import RuleLimits
from orchestrator.config.sections import ModelConfig
from orchestrator.errors import ConfigError, DataError, RewardError
from tests.deadlines import scaled
from tests.tiny import tiny_llama, tiny_scorer
from tests.unit.actors.rewards.endpoints import endpoints
from tests.unit.actors.rewards.rollouts import rollout_table

LENGTH, EXACT = "actors.rewards.rules:length_target", "actors.rewards.rules:formatted_answer"
RESPONSES = ["one two", "one two three #### 7", "#### 8"]
METAS = [{"answer": "7", "target_words": 4}] * 3


class Fixed:
    def __init__(self, *scores: Score) -> None:
        self._given = scores

    def scores(self, table: pa.Table) -> Sequence[Score]:
        return self._given


def built(sources: Mapping[str, Any], folder: Path, **context: Any) -> RewardSource:
    reward = config_from_tree({"reward": {"name": "weighted", "sources": sources}}, source="test").reward
    model = ModelConfig(path=str(folder), dtype="float32")
    return build_source(reward, RewardContext(model, None, folder, RuleLimits(), total_s=scaled(20.0), **context))


def test_the_reward_is_the_weighted_sum_and_its_parts_are_the_scores() -> None:
    first = Fixed(Score(2.0, {"model": 8.0}, tokens_cut=3), Score(-1.0, {"model": 1.0}))
    second = Fixed(Score(0.5, {"a": 0.25, "b": 0.25}), Score(4.0, {"a": 4.0, "b": 0.0}, tokens_cut=1))
    reward = WeightedReward({"x": Weighted(first, 0.75), "y": Weighted(second, -2.0, is_local=True)})
    one, other = reward.scores(rollout_table(["a", "b"]))
    assert (one.value, other.value) == (0.75 * 2 - 2 * 0.5, -0.75 - 8.0)
    assert one.parts == {"x": 2.0, "x.model": 8.0, "y": 0.5, "y.a": 0.25, "y.b": 0.25}
    assert (one.tokens_cut, other.tokens_cut) == (3, 1)


def test_a_failed_source_fails_its_sample_and_is_named() -> None:
    sources = {
        "x": Weighted(Fixed(Score(1.0), Score(None, error="no")), 1.0),
        "y": Weighted(Fixed(*[Score(1.0)] * 2), 1),
    }
    fine, failed = WeightedReward(sources).scores(rollout_table(["a", "b"]))
    assert fine.value == 2.0
    assert (failed.value, failed.error, failed.parts) == (None, "source x: no", {})


@pytest.mark.parametrize("values", [(1e308, 1e308), (math.inf, -math.inf)])
def test_a_sum_beyond_all_numbers_fails_its_sample(values: tuple[float, float]) -> None:
    sources = {name: Weighted(Fixed(Score(value), Score(1.0)), 1.0) for name, value in zip("xy", values, strict=True)}
    failed, fine = WeightedReward(sources).scores(rollout_table(["a", "b"]))
    assert failed.value is None and "is not a finite number" in str(failed.error)
    assert fine.value == 2.0


def test_other_sources_are_asked_at_the_same_time_and_models_in_the_callers_thread() -> None:
    met = threading.Barrier(2)
    asked: dict[str, threading.Thread] = {}

    class Meeting:
        def __init__(self, name: str, *, waits: bool) -> None:
            self._name, self._waits = name, waits

        def scores(self, table: pa.Table) -> Sequence[Score]:
            asked[self._name] = threading.current_thread()
            if self._waits:
                met.wait(timeout=scaled(20.0))  # broken unless both arrive
            return [Score(1.0)] * table.num_rows

    names = {"endpoint": (True, False), "rules": (True, False), "model": (False, True)}
    sources = {n: Weighted(Meeting(n, waits=waits), 1.0, is_local=local) for n, (waits, local) in names.items()}
    assert WeightedReward(sources).scores(rollout_table(["a"]))[0].value == 3.0
    assert asked["model"] is threading.current_thread() and asked["endpoint"] is not asked["rules"]


def test_a_model_rules_and_an_endpoint_add_up_to_what_each_says_alone(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    model = {"name": "model", "path": str(tiny_scorer(tmp_path / "rm")), "normalise": False, "weight": 0.5}
    table = rollout_table(RESPONSES, metas=METAS)
    with endpoints() as start:
        url = start((200, {"rewards": [1, 2, 3]})).url
        sources = {
            "quality": model,
            "brief": {"name": "rules", "rules": [{"function": LENGTH}], "weight": 2.0},
            "right": {"name": "rules", "rules": [{"function": EXACT}]},
            "remote": {"name": "http", "url": url, "weight": -1.0},
        }
        scores = built(sources, tmp_path).scores(table)
    alone = built({"quality": {**model, "weight": 1.0}}, tmp_path).scores(table)
    quality = [score.parts["quality"] for score in scores]
    assert quality == [score.value for score in alone]
    brief, right = [-0.5, -0.25, -0.5], [0.0, 1.1, 0.1]
    for row, score in enumerate(scores):
        expected = 0.5 * quality[row] + 2.0 * brief[row] + right[row] - (row + 1)
        assert score.value == pytest.approx(expected)
        parts = {"brief": brief[row], "right": right[row], "remote": row + 1}
        assert {name: score.parts[name] for name in parts} == pytest.approx(parts)
    marked = [score.parts["right.formatted_answer.format"] for score in scores]
    assert marked == [0.0, 0.1, 0.1]


def test_a_source_that_is_down_or_can_not_be_built_is_named(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    rules = {"name": "rules", "rules": [{"function": LENGTH}]}
    down = {"name": "http", "url": "http://127.0.0.1:9/x", "retries": 0}
    with pytest.raises(RewardError, match=r"reward\.sources\.remote: .*127\.0\.0\.1:9"):
        built({"brief": rules, "remote": down}, tmp_path).scores(rollout_table(["a"]))
    with pytest.raises(ConfigError, match=r"reward\.sources\.brief: .*no_such"):
        built({"brief": {"name": "rules", "rules": [{"function": "no_such:rule"}]}}, tmp_path)
    with pytest.raises(DataError, match=r"reward\.sources\.quality: .*reward_stats"):
        built({"quality": {"path": str(tiny_scorer(tmp_path / "rm"))}}, tmp_path)


def test_episodes_are_added_once(tmp_path: Path) -> None:
    episode = {"reward": 3.0, "parts": {"won": 3.0}, "error": None, "spans": []}
    table = rollout_table(["a b c d"], metas=[{"target_words": 4, "episode": episode}])
    rules = {"name": "rules", "rules": [{"function": LENGTH}]}
    (added,) = built({"brief": rules}, tmp_path, adds_episodes=True).scores(table)
    assert added.value == 3.0 and added.parts["won"] == 3.0
    tree = {"environment": {"name": "actors.environments.calculator:Calculator"}}
    sources = {"brief": rules, "played": {"name": "environment", "weight": 0.5}}
    reward = config_from_tree({**tree, "reward": {"name": "weighted", "sources": sources}}, source="test").reward
    context = RewardContext(ModelConfig(), None, tmp_path, RuleLimits(), total_s=scaled(20.0), adds_episodes=True)
    (weighted,) = build_source(reward, context).scores(table)
    assert weighted.value == 1.5 and weighted.parts["played.won"] == 3.0
    assert math.isclose(weighted.parts["brief"], 0.0)
