"""Settings of all tests."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

from tests.deadlines import scaled

# Hypothesis fails examples that take more than 0.2 s or are slow to generate; on two busy cores any example can be.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
# pytest-timeout's setting, which overrides the one in pyproject.toml.
os.environ.setdefault("PYTEST_TIMEOUT", str(scaled(300)))
