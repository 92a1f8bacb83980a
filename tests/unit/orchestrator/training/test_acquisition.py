"""What to ask: information and entropy against closed forms, choices with known best sets, and the control arm."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from orchestrator.training.acquisition import (
    ACTIVE,
    CONTROL,
    Choice,
    Signals,
    choose,
    components,
    information,
    knn_entropy,
)

LN2 = math.log(2.0)


def coin(chance: float) -> float:
    return -chance * math.log(chance) - (1 - chance) * math.log(1 - chance)


def test_heads_that_are_sure_of_the_contrary_tell_one_bit() -> None:
    assert information([[50.0, 0.0], [0.0, 50.0]]) == pytest.approx(LN2)
    chance = 1 / (1 + math.exp(-2))
    assert information([[2.0, 0.0], [0.0, 2.0]]) == pytest.approx(LN2 - coin(chance))


def test_heads_that_agree_tell_nothing_however_unsure_they_are() -> None:
    assert information([[1.0, 1.0], [1.0, 1.0]]) == 0.0  # all know that it is a coin's toss
    assert information([[3.0, 3.0], [1.0, 1.0]]) == pytest.approx(0.0, abs=1e-12)
    assert information([[3.0], [1.0]]) == pytest.approx(0.0, abs=1e-12)  # one head
    assert information([[3.0, 1.0]]) == 0.0  # one reply


def test_what_preferences_do_not_determine_is_no_information() -> None:
    """Heads differ by a constant: single scores disagree, differences do not."""
    assert information([[3.0, 103.0], [1.0, 101.0]]) == pytest.approx(0.0, abs=1e-9)


def test_information_of_several_replies_is_the_mean_over_pairs() -> None:
    scores = np.random.default_rng(0).normal(size=(4, 5))
    pairs = [information(scores[[one, other]]) for one in range(4) for other in range(one)]
    assert information(scores) == pytest.approx(np.mean(pairs))
    assert information(scores[::-1]) == pytest.approx(information(scores))
    assert 0 < information(scores) < LN2


def test_the_entropy_of_two_points_by_hand() -> None:
    # ψ(2) - ψ(1) = 1; the ball in one dimension is 2 long; the distance is 3.
    assert knn_entropy(np.array([[0.0], [3.0]])) == pytest.approx(1 + LN2 + math.log(3))


@pytest.mark.parametrize("neighbour", [1, 3])
@pytest.mark.parametrize("dims", [1, 3])
def test_the_entropy_of_a_gaussian_is_that_of_its_closed_form(dims: int, neighbour: int) -> None:
    generator = np.random.default_rng(dims)
    factor = np.tril(generator.normal(size=(dims, dims))) + 2 * np.eye(dims)
    points = generator.normal(size=(3000, dims)) @ factor.T
    known = 0.5 * dims * math.log(2 * math.pi * math.e) + math.log(abs(np.linalg.det(factor)))
    assert knn_entropy(points, neighbour) == pytest.approx(known, abs=0.09)


def test_entropy_grows_with_the_scale_and_equal_points_have_none() -> None:
    points = np.random.default_rng(1).normal(size=(50, 4))
    assert knn_entropy(3 * points) == pytest.approx(knn_entropy(points) + 4 * math.log(3))
    assert knn_entropy(np.concatenate([points, points[:1]])) == -math.inf
    assert math.isfinite(knn_entropy(np.concatenate([points, points[:1]]), 2))
    with pytest.raises(ValueError, match="no neighbour number 50"):
        knn_entropy(points, 50)


def test_components_have_variance_one_and_do_not_depend_on_the_axes() -> None:
    generator = np.random.default_rng(2)
    points = generator.normal(size=(200, 6)) * [1000.0, 5.0, 4.0, 3.0, 0.0, 0.0]
    found = components(points)
    assert found.shape == (200, 4) and np.cov(found.T, bias=True) == pytest.approx(np.eye(4), abs=1e-9)
    assert components(points, 2).shape == (200, 2)
    turned = components(points @ np.linalg.qr(generator.normal(size=(6, 6)))[0] + 7.0)
    near = lambda points: np.sqrt(np.square(points[:, None] - points[None]).sum(-1))  # noqa: E731
    assert near(turned) == pytest.approx(near(found), abs=1e-6)
    assert components(np.ones((3, 2))).shape == (3, 0)


def line(*places: float) -> np.ndarray:
    return np.array(places)[:, None]


def active(signals: Signals, budget: int, **keys: float) -> list[int]:
    """In the order of their choice, which their novelty and information give away only here."""
    return sorted(choice.index for choice in chosen(signals, budget, 0.0, **keys))


def chosen(signals: Signals, budget: int, share: float, seed: int = 0, **keys: float) -> list[Choice]:
    return choose(len(signals.information_N), signals, budget=budget, control_share=share, seed=seed, **keys)


def test_without_diversity_the_most_informative_are_taken() -> None:
    signals = Signals(np.array([0.1, 0.5, 0.3, 0.4]), line(5, 5, 5, 5), line(0))
    assert active(signals, 2, diversity=0.0) == [1, 3]


def test_without_information_the_farthest_are_taken_one_after_the_other() -> None:
    """After the one at 10 its neighbour at 9.9 is no longer far from all that is asked."""
    signals = Signals(np.zeros(4), line(1, 9.9, 10, 4), line(0))
    assert active(signals, 1) == [2]
    assert active(signals, 2) == [2, 3]
    assert active(signals, 3) == [0, 2, 3]


def test_what_is_judged_already_is_not_asked_in_other_words() -> None:
    signals = Signals(np.array([0.6, 0.1, 0.1]), line(3, 8, 9), line(0, 3))
    assert active(signals, 1, diversity=0.0) == [0]
    assert 0 not in active(signals, 2)
    assert active(signals, 3) == [0, 1, 2]  # but rather than nothing


def test_one_of_many_equal_items_is_enough() -> None:
    """Fifty informative items in one place, ten less informative ones in others."""
    generator = np.random.default_rng(3)
    crowd, others = np.zeros((50, 3)) + 1e-3 * generator.normal(size=(50, 3)), 3 * generator.normal(size=(10, 3))
    signals = Signals(np.repeat([0.5, 0.3], [50, 10]), np.concatenate([crowd, others]), np.full((1, 3), 9.0))
    assert max(active(signals, 8, diversity=0.0)) < 50
    assert sum(index < 50 for index in active(signals, 8)) <= 2


def test_both_arms_are_named_and_the_control_arm_is_at_least_its_share() -> None:
    generator = np.random.default_rng(4)
    signals = Signals(generator.random(40), generator.normal(size=(40, 3)))
    for budget, share, control in (
        (10, 0.5, 5),
        (10, 0.25, 3),
        (10, 1.0, 10),
        (1, 0.2, 1),
        (99, 0.5, 20),
        (10, 0.0, 1),
    ):
        found = chosen(signals, budget, share)
        arms = Counter(choice.arm for choice in found)
        assert arms[CONTROL] == control and len(found) == min(budget, 40)
        assert len({choice.index for choice in found}) == len(found)
        assert all(choice.why["information"] == signals.information_N[choice.index] for choice in found)
        assert all(("novelty" in choice.why) == (choice.arm == ACTIVE) for choice in found)
    assert chosen(Signals(np.zeros(0), np.zeros((0, 3))), 5, 0.5) == []


def test_a_seed_gives_the_same_choice_and_another_one_another() -> None:
    generator = np.random.default_rng(5)
    signals = Signals(generator.random(60), generator.normal(size=(60, 3)))
    assert chosen(signals, 20, 0.5) == chosen(signals, 20, 0.5) != chosen(signals, 20, 0.5, seed=1)
    equal = Signals(np.zeros(60), np.zeros((60, 3)), np.zeros((1, 3)))
    assert active(equal, 5) == active(equal, 5)
    assert active(equal, 5) != list(range(5)), "ties are broken at random, not by the order of the file"


def test_the_control_arm_is_a_fair_sample_of_all_items_and_is_asked_neither_first_nor_last() -> None:
    """Whatever the information: each of 20 items is in a control arm of 5 with probability 1/4."""
    generator = np.random.default_rng(6)
    signals = Signals(np.repeat([0.6, 0.0], 10), generator.normal(size=(20, 2)))
    counts, places = np.zeros(20), []
    for seed in range(800):
        found = chosen(signals, 10, 0.5, seed=seed)
        for place, choice in enumerate(found):
            counts[choice.index] += choice.arm == CONTROL
            places += [place] if choice.arm == CONTROL else []
    assert counts / 800 == pytest.approx(np.full(20, 0.25), abs=0.06)
    assert np.mean(places) == pytest.approx(4.5, abs=0.15)


def test_without_a_reward_model_all_are_drawn_at_random() -> None:
    found = choose(9, None, budget=4, control_share=0.2, seed=0)
    assert [choice.arm for choice in found] == [CONTROL] * 4 and len({choice.index for choice in found}) == 4
    assert all(choice.why == {} for choice in found)
