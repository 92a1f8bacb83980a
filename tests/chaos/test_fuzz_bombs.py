"""Bombs are read or refused in bounded time and memory, in separate processes, and leave nothing behind."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random

import pytest

from tests.chaos import bombs, reward_bombs
from tests.chaos.bounded import bounded
from tests.chaos.fuzzing import count_of, record
from tests.deadlines import scaled

FAMILIES = {**bombs.FAMILIES, **reward_bombs.FAMILIES}
LIMIT_S = 60.0  # on a quiet machine; CPU time has a separate limit


@pytest.mark.timeout(0)  # each input has a separate limit
@pytest.mark.parametrize("family", FAMILIES)
def test_bombs_cost_little(folder: Path, family: str) -> None:
    make, whole = FAMILIES[family]
    for number in range(count_of(whole)):
        place = folder / "bomb"
        place.mkdir()
        try:
            outcome = bounded(*make(place, Random(f"{family} {number}")), limit_s=scaled(LIMIT_S))
        finally:
            shutil.rmtree(place)
        record(family, outcome.kind, outcome.cpu_s, outcome.peak_bytes)
        outcome.require_harmless(f"{family} {number}")
