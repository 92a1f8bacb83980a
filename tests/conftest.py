"""What holds for all tests."""

from __future__ import annotations

from hypothesis import settings

# Hypothesis fails an example that takes more than 0.2 s; on two busy cores any can.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
