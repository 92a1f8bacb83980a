"""A stopped run does not start a save that Ray would interrupt, and warns about this at its start."""

from __future__ import annotations

import json
import re
import shlex

import pytest

from jobs.cluster.jobs_api import STOP_GRACE_S
from jobs.grace import WAIT_VARIABLE, saving_s, warning
from orchestrator.config.sections import RunConfig

JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(JOB, raising=False)
    monkeypatch.delenv(WAIT_VARIABLE, raising=False)


def test_outside_a_job_a_run_takes_what_its_config_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WAIT_VARIABLE, "3")
    assert saving_s(RunConfig(grace_s=30)) == 30
    assert warning(RunConfig(grace_s=30)) is None


@pytest.mark.parametrize("given", [None, "3", "nonsense"])
def test_a_plain_job_is_warned_with_a_command_line_that_is_right(
    monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    monkeypatch.setenv(JOB, "{}")
    if given:
        monkeypatch.setenv(WAIT_VARIABLE, given)
    run = RunConfig(grace_s=30)
    assert saving_s(run) == 1
    told = warning(run)
    assert told is not None and "3 s before it is killed" in told
    advice = re.search(r"`(--runtime-env-json .*?)`", told)
    assert advice is not None
    variables = json.loads(shlex.split(advice[1])[1])["env_vars"]
    monkeypatch.setenv(WAIT_VARIABLE, variables[WAIT_VARIABLE])
    assert warning(run) is None
    assert saving_s(run) == 30


def test_our_own_submit_gives_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JOB, "{}")
    monkeypatch.setenv(WAIT_VARIABLE, str(STOP_GRACE_S))
    assert warning(RunConfig()) is None
