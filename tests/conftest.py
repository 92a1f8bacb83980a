"""What holds for all tests."""

from __future__ import annotations

import os

from hypothesis import settings

from tests.deadlines import scaled

# Hypothesis fails an example that takes more than 0.2 s; on two busy cores any can.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
# pytest-timeout's own setting; it precedes the one in pyproject.toml.
os.environ.setdefault("PYTEST_TIMEOUT", str(scaled(300)))
