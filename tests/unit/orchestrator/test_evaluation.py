from __future__ import annotations

import math

import numpy as np
import pytest

from orchestrator.errors import DataError
from orchestrator.evaluation import EvaluationRow, compare


def rows(golds: dict[str, float]) -> list[EvaluationRow]:
    return [EvaluationRow(key, f"prompt {key}", "text", gold, kl=0.0, length=3) for key, gold in golds.items()]


def test_a_hand_worked_comparison():
    comparison = compare(rows({"a": 0.0, "b": 1.0, "c": 2.0}), rows({"a": 0.5, "b": 1.5, "c": 2.5}))
    assert comparison.num_prompts == 3
    assert (comparison.gold_first, comparison.gold_last) == (1.0, 1.5)
    assert comparison.sd_first == 1.0
    # all prompts gained the same, so all resamples have the same mean
    assert (comparison.delta_in_sd, comparison.low, comparison.high) == pytest.approx((0.5, 0.5, 0.5))


def test_the_interval_is_that_of_the_mean_difference():
    generator = np.random.default_rng(3)
    before = generator.normal(0.0, 2.0, 400)
    difference = generator.normal(0.3, 1.0, 400)
    comparison = compare(
        rows({str(i): x for i, x in enumerate(before)}), rows({str(i): x for i, x in enumerate(before + difference)})
    )
    half_width = 1.96 * difference.std(ddof=1) / math.sqrt(400)
    assert comparison.delta_low == pytest.approx(difference.mean() - half_width, abs=0.01)
    assert comparison.delta_high == pytest.approx(difference.mean() + half_width, abs=0.01)
    assert comparison.low == pytest.approx(comparison.delta_low / before.std(ddof=1))


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    first, last = rows({"a": 0.0, "b": 1.0, "c": 5.0}), rows({"a": 1.0, "b": 0.0, "c": 7.0})
    assert compare(first, last, seed=4) == compare(first, last, seed=4)
    generator = np.random.default_rng(0)
    many = rows({str(i): x for i, x in enumerate(generator.normal(size=50))})
    more = rows({str(i): x for i, x in enumerate(generator.normal(size=50))})
    assert compare(many, more, seed=4).low != compare(many, more, seed=5).low


def test_pairs_are_by_prompt_id_whatever_the_order():
    first, last = rows({"a": 0.0, "b": 10.0}), rows({"b": 11.0, "a": 1.0})
    comparison = compare(first, last)
    assert (comparison.delta_low, comparison.delta_high) == (1.0, 1.0)


def test_prompts_of_one_side_only_are_left_out_of_everything():
    comparison = compare(rows({"a": 0.0, "b": 2.0, "only-first": 100.0}), rows({"a": 1.0, "b": 3.0, "only-last": -5.0}))
    assert comparison.num_prompts == 2
    assert comparison.sd_first == pytest.approx(math.sqrt(2.0))


def test_several_responses_to_a_prompt_count_as_their_mean():
    first = [*rows({"a": 0.0}), *rows({"a": 2.0})]
    comparison = compare(first, rows({"a": 4.0}))
    assert (comparison.num_prompts, comparison.gold_first, comparison.delta) == (1, 1.0, 3.0)


def test_equal_start_scores_leave_no_unit_to_measure_in():
    comparison = compare(rows({"a": 1.0, "b": 1.0}), rows({"a": 1.0, "b": 2.0}))
    assert comparison.sd_first == 0.0
    assert math.isnan(comparison.delta_in_sd)
    assert comparison.delta == 0.5


def test_nothing_in_common_is_a_data_error():
    with pytest.raises(DataError, match="no prompt was scored in both"):
        compare(rows({"a": 1.0}), rows({"b": 1.0}))


def test_a_score_that_is_not_finite_is_a_data_error():
    with pytest.raises(DataError, match="gold function"):
        compare(rows({"a": math.nan}), rows({"a": 1.0}))
