"""Runs, counts and limits tests with damaged and hostile inputs.

FUZZ_SHARE is the share of the 10,000 inputs of a full fuzz that is tried (`make fuzz`: 1.0; the suite: one
twelfth). Each input may take ten seconds on a quiet machine, and less than 1 GB in addition to the process's memory.
Bombs (test_fuzz_bombs.py) run in separate processes, whose whole memory counts.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from time import perf_counter
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from orchestrator.errors import RlhfError
from tests.chaos.bounded import MAX_PEAK_BYTES
from tests.deadlines import scaled

WANTED = 10_000
SHARE = float(os.environ.get("FUZZ_SHARE", "0.08"))
OUTCOMES: dict[str, Counter[str]] = {}
SLOWEST_S: dict[str, float] = {}
LARGEST_BYTES: dict[str, int] = {}
Damages = list[Any]

_CLEAR_PEAK = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def count_of(whole: int) -> int:
    return max(round(whole * SHARE), 1)


def fuzz(count: int, **strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Runs a test on its share of `count` examples, always the same. Ten seconds on a quiet machine count as
    hanging."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        return settings(
            max_examples=count_of(count),
            derandomize=True,
            database=None,
            deadline=timedelta(seconds=scaled(10)),
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        )(given(**strategies)(test))

    return decorate


def record(test: str, outcome: str, seconds: float, peak_bytes: int) -> None:
    OUTCOMES.setdefault(test, Counter())[outcome] += 1
    SLOWEST_S[test] = max(SLOWEST_S.get(test, 0.0), seconds)
    LARGEST_BYTES[test] = max(LARGEST_BYTES.get(test, 0), peak_bytes)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def example(test: str, where: Path, *, names: Path | None = None, reads: bool = True) -> Iterator[None]:
    """One example: it may raise only an RlhfError, which names the file and is printable. Files do not change."""
    before = contents(where) if reads else {}
    message = None
    if _CLEAR_PEAK.exists():
        _CLEAR_PEAK.write_text("5")
    held_bytes, started = _peak_bytes(), perf_counter()
    try:
        yield
    except RlhfError as error:
        message = str(error)
    peak_bytes = _peak_bytes() - held_bytes
    record(test, "value" if message is None else "refused", perf_counter() - started, peak_bytes)
    assert peak_bytes < MAX_PEAK_BYTES, f"{peak_bytes / 1e6:.0f} MB"
    assert message is None or (str(names or where) in message and message.encode() and len(message) < 20_000)
    if reads:
        assert contents(where) == before
    assert not list(where.rglob("*.tmp"))


def _peak_bytes() -> int:
    """Peak memory of this process since the last reset; 0 if the system does not report it."""
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else ["VmHWM: 0 kB"]
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def summary() -> Iterator[str]:
    """One line per test, and a total."""
    for test, outcomes in sorted(OUTCOMES.items()):
        yield (
            f"{test}: {outcomes.total():,} inputs, {dict(outcomes)}, slowest {SLOWEST_S[test]:.1f} s, "
            f"largest {LARGEST_BYTES[test] / 1e6:.0f} MB"
        )
    total = sum((outcomes for outcomes in OUTCOMES.values()), Counter[str]())
    yield (
        f"{total.total():,} inputs: {dict(total)}; slowest {max(SLOWEST_S.values()):.1f} s, largest "
        f"{max(LARGEST_BYTES.values()) / 1e6:.0f} MB"
    )
