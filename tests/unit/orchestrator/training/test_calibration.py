from __future__ import annotations

import math

import pytest

from orchestrator.training.calibration import Bin, calibration, correlation


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def test_a_bin_compares_confidence_with_the_share_that_is_right() -> None:
    # Confidence 0.8, right three times of four; 0.9, right once of once.
    right, wrong = [logit(0.8), 0.0], [0.0, logit(0.8)]
    found = calibration([right, right, right, wrong, [logit(0.9), 0.0]], [[1, 1]] * 5)
    assert found.curve == [Bin(pytest.approx(0.8), 0.75, 4), Bin(pytest.approx(0.9), 1.0, 1)]
    assert found.expected_error == pytest.approx((4 * 0.05 + 0.1) / 5)
    assert found.length_correlation is None


def test_equal_scores_are_half_right_and_have_no_confidence() -> None:
    assert calibration([[2.0, 2.0]], [[1, 2]]).curve == [Bin(0.5, 0.5, 1)]


def test_all_pairs_of_a_ranking_count() -> None:
    assert sum(part.pairs for part in calibration([[3.0, 2.0, 1.0], [1.0, 0.0]], [[1, 2, 3], [1, 2]]).curve) == 4


def test_certainty_is_in_the_last_bin() -> None:
    assert calibration([[1000.0, 0.0]], [[1, 2]]).curve == [Bin(1.0, 1.0, 1)]


def test_without_replies_there_is_nothing_to_say() -> None:
    found = calibration([], [])
    assert (found.curve, found.expected_error, found.length_correlation) == ([], None, None)


def test_longer_replies_with_higher_scores_are_correlated() -> None:
    assert calibration([[3.0, 2.0], [1.0]], [[30, 20], [10]]).length_correlation == pytest.approx(1.0)
    assert correlation([1.0, 2.0, 3.0], [1.0, 0.0, 1.0]) == pytest.approx(0.0)
