"""Ensembles of reward heads: weights of the bootstrap, and disagreement by hand."""

from __future__ import annotations

import numpy as np
import pytest

from orchestrator.training.ensemble import (
    bootstrap_weights,
    disagreement,
    head_seeds,
    mean_disagreement,
    mean_scores,
)

IDS = [f"prompt {number}" for number in range(4000)]


def test_weights_depend_on_seed_prompt_and_head_alone() -> None:
    weights = bootstrap_weights(IDS[:20], 3, seed=5)
    assert np.array_equal(bootstrap_weights(IDS[10:20], 2, seed=5), weights[10:, :2])
    assert np.array_equal(bootstrap_weights(IDS[:2] * 2, 3, seed=5), np.concatenate([weights[:2]] * 2))
    assert not np.isin(bootstrap_weights(IDS[:20], 3, seed=6), weights).any()
    assert len(np.unique(weights)) == weights.size and weights.shape == (20, 3)
    assert bootstrap_weights([], 3, seed=5).shape == (0, 3)


def test_weights_are_exponential_with_mean_one_and_independent_over_heads() -> None:
    weights = bootstrap_weights(IDS, 2, seed=0)
    assert weights.min() > 0.0
    for head in weights.T:
        quantiles = [float((head <= -np.log(1 - share)).mean()) for share in (0.1, 0.5, 0.9)]
        assert quantiles == pytest.approx([0.1, 0.5, 0.9], abs=0.03)
        assert head.mean() == pytest.approx(1.0, abs=0.06)
    assert abs(np.corrcoef(weights.T)[0, 1]) < 0.06


def test_the_first_head_starts_as_a_single_one() -> None:
    assert head_seeds(7, 1) == [7]
    assert head_seeds(7, 3)[:2] == head_seeds(7, 2)
    assert len({*head_seeds(7, 3), *head_seeds(8, 3)}) == 6


def test_disagreement_is_the_deviation_over_heads() -> None:
    scores = [[1.0, 3.0], [2.0, 2.0]]
    assert mean_scores(scores).tolist() == [2.0, 2.0]
    assert disagreement(scores).tolist() == [1.0, 0.0]


def test_pairs_are_right_or_wrong_by_the_mean_of_the_heads() -> None:
    differences = np.array([[2.0, 0.0], [3.0, 1.0], [-4.0, 1.0], [1.0, -1.0]])
    assert mean_disagreement(differences) == (1.0, 2.5)  # the last pair has equal scores
    assert mean_disagreement(differences[:1]) == (1.0, None)
    assert mean_disagreement(np.zeros((0, 2))) == (None, None)
