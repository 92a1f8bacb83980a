"""Metrics of an evaluation by hand, and the bounds that a pipeline can require."""

from __future__ import annotations

import pyarrow as pa
import pytest

from jobs.stages.work.evaluate import Side, _alone, _together, _unmet
from orchestrator.config.loader import config_from_tree
from orchestrator.errors import ConfigError


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


@pytest.mark.parametrize(
    ("bound", "is_met"), [("> 0.5", False), (">= 0.5", True), ("<0.5", False), (" <= 0.5 ", True), ("> -1", True)]
)
def test_bounds(bound: str, is_met: bool) -> None:
    assert (_unmet({"win": 0.5}, "win", bound) is None) == is_met
    assert "was not measured (there are win)" in str(_unmet({"win": 0.5}, "won", bound))


def test_a_bound_that_is_none_is_an_error_of_the_config() -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.require"):
        config_from_tree({"evaluate": {"require": {"gold": "about 3"}}}, source="test")
