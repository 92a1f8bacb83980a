"""Deadlines of tests grow with the machine's slowness and load, and can be set manually."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.config.sections import DeadlinesConfig
from tests import deadlines
from tests.deadlines import MIN_FACTOR, QUIET_PROBE_S, VARIABLE, of_a_run, scaled

ROOT = Path(__file__).resolve().parents[2]
BARE = re.compile(
    r"\btimeout=\d|monotonic\(\) \+ \d|wait_for\([^\n]*, \d+\)|asyncio\.timeout\(\d|monotonic\(\) - started < \d"
)
# Virtual time, and numbers in a program's text.
ALLOWED = {
    "tests/unit/orchestrator/planning/simulation/test_run.py",
    "tests/ray_local/net.py",
    "tests/ray_local/other_user.py",
    "tests/unit/test_deadlines.py",
}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A quiet machine, as fast as the one that deadlines are written for."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(deadlines, "_probe_s", lambda: QUIET_PROBE_S)
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    deadlines.patience.cache_clear()
    yield monkeypatch
    deadlines.patience.cache_clear()


def test_a_quiet_fast_machine_gets_a_little_more_than_is_ample(machine: pytest.MonkeyPatch) -> None:
    assert scaled(10) == 10 * MIN_FACTOR


def test_a_slow_machine_gets_more(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(deadlines, "_probe_s", lambda: 3 * QUIET_PROBE_S)
    assert scaled(10) == pytest.approx(30)
    assert of_a_run()["start_s"] == pytest.approx(3 * DeadlinesConfig().start_s)


def test_a_busy_machine_gets_more(machine: pytest.MonkeyPatch) -> None:
    machine.setattr("os.getloadavg", lambda: (8.0, 1.0, 1.0))
    assert scaled(10) == pytest.approx(40)


def test_a_hanging_test_ends_on_any_machine(machine: pytest.MonkeyPatch) -> None:
    machine.setattr("os.getloadavg", lambda: (800.0, 1.0, 1.0))
    assert scaled(10) == 10 * deadlines.LARGEST


def test_it_can_be_set_by_hand_and_child_processes_take_it_over(machine: pytest.MonkeyPatch) -> None:
    machine.setenv(VARIABLE, "7")
    assert scaled(10) == 70
    code = "from tests.deadlines import scaled; print(scaled(10))"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(shown.stdout) == 70
    machine.setenv(VARIABLE, "0.1")
    deadlines.patience.cache_clear()
    assert scaled(10) == 10, "never less than is ample on a quiet machine"


def test_no_test_waits_for_a_fixed_time() -> None:
    """Use scaled(10) from tests.deadlines, not 10."""
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        if path.relative_to(ROOT).as_posix() not in ALLOWED
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if BARE.search(line)
    ]
    assert found == []
