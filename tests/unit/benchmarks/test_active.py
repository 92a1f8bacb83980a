"""The reward model of the benchmark of active selection, and its rounds, on planted data."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit

from benchmarks.active import (
    BATCH,
    CONTENDERS,
    LAST,
    RANDOM,
    START,
    Data,
    Pairs,
    accuracy,
    curves_of,
    figures_of,
    fitted,
)


def test_a_head_is_the_minimum_of_its_loss() -> None:
    """There the gradient of -log σ, weighted, is the pull of the start."""
    generator = np.random.default_rng(0)
    differences, weights, start = (
        generator.normal(size=(30, 50)),
        generator.exponential(size=30),
        generator.normal(size=50),
    )
    found = fitted(differences, weights, start, decay=0.7)
    pull = differences.T @ (weights * expit(-differences @ found))
    assert 0.7 * (found - start) == pytest.approx(pull, abs=1e-4)


def test_one_pair_by_hand() -> None:
    """w = σ(-w): 0.4011."""
    assert fitted(np.array([[1.0]]), np.array([1.0]), np.array([0.0]), decay=1.0)[0] == pytest.approx(
        0.401058, abs=1e-6
    )


def test_pairs_are_ordered_by_scores_and_ties_left_out() -> None:
    data = Data([("a", "b")] * 3, np.arange(6.0).reshape(3, 2, 1))
    found = data.ordered(np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 2.0]]))
    assert found.better_PD.tolist() == [[0.0], [5.0]] and found.worse_PD.tolist() == [[1.0], [4.0]]
    assert accuracy(np.array([[-1.0, 0.5]]), found) == 0.5


def test_contenders_start_from_the_same_labels_and_a_seed_gives_the_same_curve() -> None:
    generator = np.random.default_rng(1)
    better, worse = generator.normal(size=(2, 750, 6)) / np.sqrt(6)
    swap = (better - worse) @ np.arange(6) < 0
    pairs = Pairs(np.where(swap[:, None], worse, better), np.where(swap[:, None], better, worse))
    found = curves_of(pairs, 0)
    assert set(found) == set(CONTENDERS) and curves_of(pairs, 0) == found
    assert {len(curve) for curve in found.values()} == {(LAST - START) // BATCH + 1}
    assert len({curve[0] for curve in found.values()}) == 1
    assert all(curve[-1] > 0.9 for curve in found.values())
    figures = {figure.name: figure for figure in figures_of("planted", [found, found])}
    assert "less random, in points 0.000 (95 %: 0.000 to 0.000)" in figures[f"planted: {RANDOM}, 240 labels"].detail
    assert figures["planted: both, 240 labels"].value == pytest.approx(found["both"][-1])
