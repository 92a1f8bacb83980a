"""Killed, frozen and stopped processes do not change the result. This is the core of the matrix of `make chaos`."""

from __future__ import annotations

import pytest

from tests.chaos.conftest import assert_as_quiet, blow
from tests.chaos.matrix import Field, Outcome
from tests.deadlines import scaled

pytestmark = [pytest.mark.ray, pytest.mark.heavy, pytest.mark.slow, pytest.mark.timeout(scaled(900))]

LATE_S = scaled(10.0)  # seconds within which a missed deadline is reported


def test_a_run_in_which_each_kind_of_process_was_killed_ends_as_a_quiet_one(here: Field, quiet: Outcome) -> None:
    plan = [
        blow("rollout", 0, "generate"),
        blow("reference", 1, "score"),
        blow("reward", 2, "generate"),
        blow("policy", 3, "learn"),
        blow("critic", 4, "publish"),
        blow("driver", 6, "save"),
    ]
    outcome = here.run("killed", plan)
    assert outcome.struck == len(plan)
    assert_as_quiet(outcome, quiet)
    actions = [event["action"] for event in outcome.events("recovered")]
    assert actions == ["restart actor"] * 3 + ["restart learners"] * 2
    assert len(list((outcome.path / "attempts").iterdir())) == 2
    # A checkpoint every second step, saved during the next step; three restarts of learners or driver.
    assert outcome.relearned() <= 3 * 2


def test_a_run_without_a_critic_ends_as_a_quiet_one_too(here: Field) -> None:
    keys = ("algorithm.name=grpo", "rl.prompts_per_step=4", "rl.samples_per_prompt=4")
    quiet = here.run("groups", [], *keys)
    plan = [blow("policy", 2, "learn"), blow("policy", 3, "publish") | {"rank": 1}, blow("driver", 5, "score")]
    outcome = here.run("groups-killed", plan, *keys)
    assert outcome.struck == len(plan)
    assert_as_quiet(outcome, quiet)
    assert not list(outcome.path.glob("checkpoints/*/critic"))
    assert [event["action"] for event in outcome.events("recovered")] == ["restart learners"] * 2


def test_what_freezes_is_found_named_and_replaced(here: Field, quiet: Outcome) -> None:
    # At the start of the phase: it lasts 50 ms, and a process that freezes afterwards is not missed.
    plan = [
        blow("rollout", 1, "generate", "STOP") | {"delay_s": 0.0},
        blow("policy", 2, "learn", "STOP") | {"delay_s": 0.0, "rank": 1},
    ]
    deadlines = {"generate": scaled(15.0), "learn": scaled(20.0)}
    overrides = [f"deadlines.{name}_s={seconds}" for name, seconds in deadlines.items()]
    outcome = here.run("frozen", plan, *overrides)
    assert_as_quiet(outcome, quiet)
    failures = outcome.events("failure")
    assert [event["role"] for event in failures] == ["rollout", "policy"]
    for index, (event, deadline_s) in enumerate(zip(failures, deadlines.values(), strict=True)):
        pid, struck_at = (here.folder / f"frozen.{index}").read_text().split()
        assert event["exit"] == "stopped (SIGSTOP)"
        assert event["pid"] == int(pid), "the wrong process is blamed"
        assert event["error"] == "DeadlineExceeded"
        assert event["time"] - float(struck_at) < deadline_s + LATE_S
        assert "Thread" in (outcome.path / event["stacks"]).read_text()
