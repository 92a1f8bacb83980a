from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos import fuzzing
from tests.chaos.matrix import STEPS, Blow, Field, Outcome, actors_left, one_node


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    with one_node(tmp_path_factory.mktemp("chaos")) as field:
        yield field


@pytest.fixture(scope="module")
def quiet(here: Field) -> Outcome:
    """An undisturbed run on one engine; all others have two."""
    outcome = here.run("quiet", (), "rollout.replicas=1")
    assert outcome.code == 0, outcome.output
    return outcome


def blow(role: str, step: int, phase: str, kind: str = "KILL") -> Blow:
    return {"role": role, "step": step, "phase": phase, "signal": kind, "delay_s": 0.05}


def assert_as_quiet(outcome: Outcome, quiet: Outcome) -> None:
    assert outcome.code == 0, outcome.output
    assert outcome.bits() == quiet.bits()
    assert outcome.steps() == list(range(STEPS))
    assert outcome.tokens() == quiet.tokens(), "a committed step was sampled again or lost"
    assert actors_left() == []


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """In memory if possible: thousands of files are written and synced."""
    memory = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="fuzz", dir=memory if memory.is_dir() else None))
    yield path
    shutil.rmtree(path)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The inputs that a fuzz tried; a full one must try all."""
    if fuzzing.OUTCOMES:
        terminalreporter.section("fuzz")
        for line in fuzzing.summary():
            terminalreporter.line(line)


def pytest_sessionfinish(session: pytest.Session) -> None:
    tried = sum(outcomes.total() for outcomes in fuzzing.OUTCOMES.values())
    if fuzzing.SHARE >= 1 and not session.exitstatus and tried < fuzzing.WANTED:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
