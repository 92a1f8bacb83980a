"""The shared parts of algorithms."""

from __future__ import annotations

import pytest

from orchestrator.algorithms.grpo import Grpo


def test_without_a_target_the_kl_coefficient_is_fixed() -> None:
    assert Grpo().next_kl_coefficient(0.3, observed_kl=50.0, num_samples=100) == 0.3


def test_with_a_target_the_kl_coefficient_follows_the_kl() -> None:
    # Ziegler 2019: relative error clipped to ±0.2, times samples over horizon: 1 + 0.2 · 100 / 1000
    algorithm = Grpo(adaptive_kl_target=2.0, kl_horizon_samples=1000)
    assert algorithm.next_kl_coefficient(1.0, observed_kl=50.0, num_samples=100) == pytest.approx(1.02)
    assert algorithm.next_kl_coefficient(1.0, observed_kl=2.0, num_samples=100) == 1.0
