"""The time limit of a stopped run to save its state."""

from __future__ import annotations

import os

from orchestrator.config.sections import RunConfig

# The time that Ray gives a stopped job before it kills it, and the variable of the job that changes it.
RAYS_WAIT_S = 3.0
WAIT_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray in the environment of a job's command
_UNWIND_S = 2.0  # for actors to end and for the last event, before Ray kills


def saving_s(run: RunConfig) -> float:
    """Seconds for the checkpoint of a stopped run: run.grace_s, or less if Ray would kill the job before that."""
    given = _given_s()
    return run.grace_s if given is None else max(0.1, min(run.grace_s, given - _UNWIND_S))


def warning(run: RunConfig) -> str | None:
    """A line for the console if Ray gives this job less time than run.grace_s."""
    given = _given_s()
    if given is None or given >= run.grace_s + _UNWIND_S:
        return None
    needed = round(run.grace_s + 15)
    return (
        f"warning: `ray job stop` gives this job {given:g} s before it is killed, and saving may take run.grace_s="
        f"{run.grace_s:g} s. When it is stopped, committed steps are safe, but what was learned since the last "
        "checkpoint is learned again from the log. For time to save, submit with `--runtime-env-json "
        f'\'{{"env_vars": {{"{WAIT_VARIABLE}": "{needed}"}}}}\'`, or through `rlhf submit`.'
    )


def _given_s() -> float | None:
    """None: not a Ray job."""
    if _JOB not in os.environ:
        return None
    try:
        return float(int(os.environ.get(WAIT_VARIABLE, RAYS_WAIT_S)))
    except ValueError:
        return RAYS_WAIT_S
