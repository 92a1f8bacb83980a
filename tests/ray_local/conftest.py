"""A cluster of three hosts, for the tests that need several."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ray_local.net import Cluster, three_nodes


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="tn", dir="/tmp"))  # Ray's socket paths must be short
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    with three_nodes(folder) as running:
        yield running
