"""The coordinator's memory does not grow with the number of samples."""

from __future__ import annotations

import pytest

from benchmarks.coordinator_memory import SIZES, measure

ALLOWED_BYTES = 50_000_000


@pytest.mark.ray
@pytest.mark.slow
def test_a_step_128_times_as_large_costs_the_coordinator_less_than_50_mb() -> None:
    small, large = (measure(size) for size in SIZES)
    assert large - small < ALLOWED_BYTES, f"peak {small} bytes at {SIZES[0]} samples, {large} at {SIZES[1]}"
