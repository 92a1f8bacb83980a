"""Metrics of an evaluation by hand, and the bounds that a pipeline can require."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from actors.rewards.pair_judge import Comparison
from jobs.stages.work.evaluate import Side, _alone, _by_language, _languages, _together, _unmet, judge_metrics
from orchestrator.config.loader import config_from_tree
from orchestrator.errors import ConfigError, DataError
from orchestrator.types import Prompt


def side(gold: list[float | None], reward: list[float | None] | None = None) -> Side:
    count = len(gold)
    samples = pa.table({"response_tokens": [[1, 2]] * count, "finish_reason": ["stop"] * (count - 1) + ["length"]})
    return Side(samples, gold, reward or [None] * count)


def test_a_side_alone_counts_failures_and_ends() -> None:
    found = _alone(side([1.0, 0.0, None, 2.0]))
    assert found == {"length": 2.0, "stopped": 0.75, "gold": 1.0, "gold_failed": 1.0}


def test_win_rates_are_by_prompt_and_ties_count_half() -> None:
    found = _together(side([1.0, 0.0, None, 2.0], [1.0] * 4), side([0.0, 0.0, 5.0, 3.0], [0.0, 0.0, 0.0, 2.0]))
    assert found["gold_win_rate"] == 0.5 and found["gold_against"] == 1.0
    assert found["gold_delta"] == pytest.approx(0.0)
    assert found["reward_win_rate"] == 0.75
    assert 0.0 < found["reward_win_low"] < 0.75 < found["reward_win_high"] < 1.0


def test_metrics_are_given_for_each_language_that_prompts_name() -> None:
    samples = pa.table(
        {
            "prompt_id": ["b", "a", "c", "d"],
            "response_tokens": [[1], [1, 2, 3], [1] * 5, [1]],
            "finish_reason": ["stop", "stop", "length", "stop"],
        }
    )
    metas = {"a": {"lang": "zh"}, "b": {"language": "en"}, "c": {"lang": "zh"}, "d": {}}
    prompts = [Prompt(name, name, np.zeros(1, np.int32), meta) for name, meta in metas.items()]
    languages = _languages(prompts, samples)
    assert languages == {"en": [0], "zh": [1, 2]}
    policy = Side(samples, [1.0, 2.0, 4.0, 0.0], [None] * 4)
    other = Side(samples, [0.0, 3.0, None, 0.0], [None] * 4)
    found = _by_language(languages, lambda rows: _alone(policy.of(rows)) | _together(policy.of(rows), other.of(rows)))
    assert found["gold/en"] == 1.0 and found["gold/zh"] == 3.0 and found["length/zh"] == 4.0
    assert found["gold_win_rate/en"] == 1.0 and found["gold_win_rate/zh"] == 0.0
    assert _languages(prompts[1:2] + prompts[3:], samples.take([0, 3])) == {}, "one language needs no table"


@pytest.mark.parametrize(
    ("bound", "is_met"), [("> 0.5", False), (">= 0.5", True), ("<0.5", False), (" <= 0.5 ", True), ("> -1", True)]
)
def test_bounds(bound: str, is_met: bool) -> None:
    assert (_unmet({"win": 0.5}, "win", bound) is None) == is_met
    assert "was not measured (there are win)" in str(_unmet({"win": 0.5}, "won", bound))


def test_a_bound_that_is_none_is_an_error_of_the_config() -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.require"):
        config_from_tree({"evaluate": {"require": {"gold": "about 3"}}}, source="test")


def test_a_judges_win_rate_counts_ties_and_disagreements_half() -> None:
    compared = [Comparison(1.0), Comparison(1.0), Comparison(0.0), Comparison(0.5), Comparison(0.5, disagrees=True)]
    found = judge_metrics([*compared, Comparison(None, error="no verdict")], max_failed_fraction=0.2)
    assert found.pop("judge_win_low") < 0.6 < found.pop("judge_win_high")
    assert found == {
        "judge_win_rate": pytest.approx(0.6),
        "judge_ties": 2.0,
        "judge_disagreed": 1.0,
        "judge_failed": 1.0,
    }


@pytest.mark.parametrize("most", [0.1, 1.0])
def test_a_judge_that_fails_too_often_is_an_error_that_says_why(most: float) -> None:
    failed = Comparison(None, error="no verdict: 'x'")
    with pytest.raises(
        DataError, match=r"failed on 2 of 2 pairs, more than reward\.max_failed_fraction.*no verdict: 'x'"
    ):
        judge_metrics([failed] * 2, max_failed_fraction=most)
