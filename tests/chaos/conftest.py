from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos.matrix import STEPS, Blow, Field, Outcome, actors_left, one_node


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    with one_node(tmp_path_factory.mktemp("chaos")) as field:
        yield field


@pytest.fixture(scope="module")
def quiet(here: Field) -> Outcome:
    """A run that nothing disturbs, on one engine; all others have two."""
    outcome = here.run("quiet", (), "rollout.engines=1")
    assert outcome.code == 0, outcome.output
    return outcome


def blow(role: str, step: int, phase: str, kind: str = "KILL") -> Blow:
    return {"role": role, "step": step, "phase": phase, "signal": kind, "delay_s": 0.05}


def assert_as_quiet(outcome: Outcome, quiet: Outcome) -> None:
    assert outcome.code == 0, outcome.output
    assert outcome.bits() == quiet.bits()
    assert outcome.steps() == list(range(STEPS))
    assert outcome.tokens() == quiet.tokens(), "something that was committed was sampled again, or lost"
    assert actors_left() == []
