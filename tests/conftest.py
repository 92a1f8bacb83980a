"""What holds for all tests."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

from tests.deadlines import scaled

# Hypothesis fails an example that takes more than 0.2 s, and examples that are slow to make; on two busy cores any can.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
# pytest-timeout's own setting; it precedes the one in pyproject.toml.
os.environ.setdefault("PYTEST_TIMEOUT", str(scaled(300)))
