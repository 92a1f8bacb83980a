"""Algorithms reach the known optimum of a small problem; `python -m benchmarks.algorithms` runs all combinations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.algorithms import (
    BETA,
    FORMS,
    TOLERANCE,
    WITHOUT_OPTIMUM,
    Problem,
    distance,
    forms_of,
    optimum,
    settings,
    train,
)
from orchestrator.algorithms.table import ALGORITHMS

PROBLEM = Problem.seeded()
CHOSEN = [
    *((name, "k1-reward") for name in ALGORITHMS if "k1-reward" in forms_of(name)),
    *(("rloo", form) for form in FORMS if form not in {"k1-reward", *WITHOUT_OPTIMUM}),
    ("grpo", "k3-loss"),
    ("gdpo", "k3-loss"),
    ("ppo", "unbiased-loss"),
    ("gspo", "k2-loss"),
    ("reinforce++", "unbiased-loss"),
    ("cispo", "none"),
    ("dapo", "none"),
]


@pytest.mark.parametrize(("name", "form"), CHOSEN)
def test_the_optimum_is_reached(name: str, form: str) -> None:
    torch.set_num_threads(1)
    policies = train(name, form, PROBLEM)
    best = optimum(name, form, PROBLEM)
    assert distance(policies[0], best) > 3 * TOLERANCE, "the reference is not the optimum"
    assert distance(policies[-1], best) < TOLERANCE


def test_the_optimum_of_k1_in_the_reward_is_the_best_policy() -> None:
    # E r - β KL(p || q) of a policy nearby is lower.
    def value(policy: np.ndarray) -> float:
        return float((policy * (PROBLEM.rewards - BETA * (np.log(policy) - PROBLEM.reference))).sum())

    best = optimum("rloo", "k1-reward", PROBLEM)
    generator = np.random.default_rng(0)
    for _ in range(100):
        other = best * np.exp(0.1 * generator.normal(size=best.shape))
        assert value(other / other.sum(1, keepdims=True)) < value(best)


def test_the_optimum_of_k3_in_the_loss_is_that_of_the_other_kl() -> None:
    best = optimum("rloo", "k3-loss", PROBLEM)
    np.testing.assert_allclose(best.sum(1), 1.0, rtol=1e-9)
    # The gradient of Σ p r + β Σ q log p is the same for every token.
    gradient = PROBLEM.rewards + BETA * np.exp(PROBLEM.reference) / best
    np.testing.assert_allclose(gradient, np.broadcast_to(gradient[:, :1], gradient.shape), rtol=1e-9)


@pytest.mark.parametrize("form", WITHOUT_OPTIMUM)
def test_k2_and_k3_in_the_reward_do_not_lead_to_the_best_policy(form: str) -> None:
    policy = train("rloo", form, PROBLEM)[-1]
    assert distance(policy, optimum("rloo", form, PROBLEM)) > TOLERANCE


def test_every_algorithm_learns_twice_from_its_samples() -> None:
    assert {settings(name, "none").epochs for name in ALGORITHMS} == {2}
