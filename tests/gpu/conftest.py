"""Tests that need an NVIDIA GPU and are skipped without one: `python -m pytest tests/gpu`, in an environment with
CUDA builds (requirements/gpu.txt). They have not been run yet."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from tests.integration.conftest import apart as apart

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU that torch can use"))
