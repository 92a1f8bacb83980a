"""The state of an attempt, and what failed first in it: pure, and total for any broken run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

from jobs.why.facts import Beat, Event, Facts
from jobs.why.reader import stages_of, whole
from orchestrator.watching.heartbeat import EVERY_S, FINISHED, STOPPED

State = Literal["finished", "running", "waiting", "paused", "starting", "frozen", "stopped", "failed", "killed"]
GOOD: frozenset[State] = frozenset({"finished", "running", "waiting", "paused", "starting"})
ALIVE_S = 3 * EVERY_S
STARTING_S = 120.0  # the preflight and the start of Ray come before the first heartbeat
STAGE_ENDS = {
    "stage_started": "begun",
    "stage_finished": "finished",
    "stage_failed": "failed",
    "stage_set_aside": "set aside",
}
_ON_PURPOSE = ("KeyboardInterrupt", "CancelledError", "Superseded")
_ROLE_ERROR = re.compile(r"(\w+) rank (\d{1,9}) failed in '([^']*)': (.*)", re.DOTALL)
_LONGEST = 400


@dataclass(frozen=True)
class FirstFailure:
    """What failed first: an actor, a guard, or the driver itself. None: unknown or not applicable.

    Args:
        is_answered: the run recovered from it.
    """

    attempt: int
    time: float
    role: str
    error: str
    cause: str
    rank: int | None = None
    operation: str | None = None
    category: str | None = None
    node: str | None = None
    pid: int | None = None
    exit: str | None = None
    step: int | None = None
    stacks: str | None = None
    log: Sequence[str] = ()
    is_answered: bool = False


def state_of(facts: Facts, attempt: int) -> State:
    """The state of the run, from its last attempt."""
    is_last = attempt == facts.last_attempt
    events, beat = facts.of(attempt), facts.beat_of(attempt)
    stage_ends = [event for event in (facts.events if is_last else events) if event.kind in STAGE_ENDS]
    final = [event.kind for event in stage_ends if event.stage == _last_stage(facts, events)]
    ended = beat.ended if beat else None
    if final[-1:] == ["stage_finished"] or ended == FINISHED:
        return "finished"
    if ended or end_of(events):
        return "stopped" if ended == STOPPED or was_stopped(events) else "failed"
    if beat is None and was_stopped(events):
        return "stopped"
    if beat is None:
        is_young = facts.now - facts.last_sign(attempt) < STARTING_S
        return "starting" if is_last and is_young else "killed"
    return _state_by_beat(facts, beat)


def _last_stage(facts: Facts, events: Sequence[Event]) -> str:
    """The last stage of an attempt, which may not be the last of the config."""
    named = [stages for event in events if (stages := stages_of(event))]
    return (named[-1] if named else facts.stages)[-1]


def _state_by_beat(facts: Facts, beat: Beat) -> State:
    beats = facts.now - beat.time < ALIVE_S
    if beat.process == "gone" or (beat.process == "unknown" and not beats):
        return "killed"
    if beat.process == "stopped" or not beats:
        return "frozen"
    if beat.people is not None:
        return "waiting"
    return "paused" if beat.paused or facts.paused is not None else "running"


def end_of(events: Sequence[Event]) -> str | None:
    """The end that an attempt recorded; the reason for giving up precedes the resulting error."""
    for kind, field in (("gave_up", "reason"), ("stage_failed", "error")):
        for event in events:
            if event.kind == kind:
                return brief(event.fields.get(field) or "it gave no reason")
    return None


def was_stopped(events: Sequence[Event]) -> bool:
    """Whether the end was requested from outside."""
    errors = [str(event.fields.get("error")) for event in events if event.kind == "stage_failed"]
    return any(event.kind == "stop_requested" for event in events) or (
        bool(errors) and all(error.startswith(_ON_PURPOSE) for error in errors)
    )


def first_failure(facts: Facts, attempt: int, state: State) -> FirstFailure | None:
    """The first failure from which the run did not recover; if there is none, the first of the attempt.

    A pause that a user ended counts as recovered.
    """
    events = facts.of(attempt)
    recoveries = [number for number, event in enumerate(events) if event.kind in ("recovered", "pause_ended")]
    begin = recoveries[-1] + 1 if recoveries else 0
    for event in events[begin:]:
        if _is_failure(event):
            return failure_of(event)
    if state == "killed":
        return _killed(facts, attempt)
    for event in events[begin:]:
        if event.kind == "stage_failed" and not was_stopped(events):
            return _driver_failure(event)
    return next((replace(failure_of(event), is_answered=True) for event in events if _is_failure(event)), None)


def _is_failure(event: Event) -> bool:
    return event.kind == "failure" or (event.kind == "guard" and event.fields.get("action") in ("pause", "stop"))


def failure_of(event: Event) -> FirstFailure:
    """The failure in a `failure` or `guard` event."""
    fields = event.fields
    if event.kind == "guard":
        metric, bound, action = (brief(fields.get(name)) for name in ("metric", "bound", "action"))
        value = "not finite" if fields.get("value") is None else brief(fields["value"])
        return FirstFailure(
            attempt=event.attempt,
            time=event.time,
            role=f"guard {brief(fields.get('guard'))}",
            error="GuardTripped",
            cause=f"{metric} is {value}, its bound {bound}; action: {action}",
            step=whole(fields.get("step")),
        )
    log = fields.get("log")
    return FirstFailure(
        attempt=event.attempt,
        time=event.time,
        role=brief(fields.get("role") or "no role in particular"),
        error=brief(fields.get("error") or "unknown error"),
        cause=brief(fields.get("cause") or "not known"),
        rank=whole(fields.get("rank")) if fields.get("role") else None,
        operation=_known(fields.get("operation")),
        category=_known(fields.get("category")),
        node=_known(fields.get("node")),
        pid=whole(fields.get("pid")),
        exit=_known(fields.get("exit")),
        step=whole(fields.get("step")),
        stacks=_known(fields.get("stacks")),
        log=[brief(line) for line in log] if isinstance(log, list) else (),
    )


def _driver_failure(event: Event) -> FirstFailure:
    """The end of a stage without a supervisor's report; RoleError's message names the role."""
    error, _, cause = str(event.fields.get("error") or "unknown error").partition(": ")
    found = _ROLE_ERROR.fullmatch(cause)
    role, rank, operation, rest = found.groups() if found else ("driver", None, f"stage {event.stage}", cause)
    return FirstFailure(
        event.attempt,
        event.time,
        role,
        brief(error),
        brief(rest),
        rank=int(rank) if rank else None,
        operation=operation,
    )


def _killed(facts: Facts, attempt: int) -> FirstFailure:
    cause = "left no end: SIGKILL, out of memory, or its node was lost"
    beat = facts.beat_of(attempt)
    if beat is None:
        return FirstFailure(attempt, facts.last_sign(attempt), "driver", "killed", cause)
    operation = f"stage {beat.stage}" if beat.stage else None
    return FirstFailure(
        attempt, beat.time, "driver", "killed", cause, operation=operation, node=beat.host, pid=beat.pid, step=beat.step
    )


def title(failure: FirstFailure) -> str:
    """The culprit and the error, on one line."""
    rank = f" rank {failure.rank}" if failure.rank is not None else ""
    operation = f" in {failure.operation}" if failure.operation else ""
    step = f", step {failure.step}" if failure.step is not None else ""
    return f"{failure.role}{rank}: {failure.error}{operation}{step}"


def moment(time: float) -> str:
    """Seconds since the epoch as local date and time."""
    return f"{datetime.fromtimestamp(time).astimezone():%Y-%m-%d %H:%M:%S}"


def brief(value: Any) -> str:
    """One line of bounded length."""
    text = f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def _known(value: Any) -> str | None:
    return None if value in (None, "") else brief(value)
