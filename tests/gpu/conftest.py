"""Tests that need an NVIDIA GPU and are skipped without one, with the reason: `make test-gpu`, in an environment with
CUDA builds (requirements/gpu.txt) and pytest. docs/gpu.md lists them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from actors.machine.devices import why_none_here
from tests.integration.conftest import apart as apart

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    reason = why_none_here()
    if reason is None:
        return
    if os.environ.get("REQUIRE_GPU"):
        pytest.exit(f"make test-gpu needs a GPU that torch can use: {reason}", returncode=2)
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=f"needs an NVIDIA GPU: {reason}"))
