"""Turns the facts of a run folder into sentences: what failed first, how the run reacted, its progress and state."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from jobs.why.facts import Beat, Event, Facts, PeopleWait
from jobs.why.failure import (
    STAGE_ENDS,
    FirstFailure,
    State,
    brief,
    end_of,
    failure_of,
    first_failure,
    moment,
    state_of,
    title,
)
from jobs.why.reader import number
from orchestrator.run.folder import CONFIG_FILE
from orchestrator.watching.guards import PAUSED_FILE

_MOST_DEEDS = 12
_MOST_CALLS = 5
_LASTING = ("programming", "data")


@dataclass(frozen=True)
class Standing:
    """`stages`: name to "finished", "failed", "begun", "set aside" or "not begun". Steps are those of `logged`."""

    attempts: int
    stages: Mapping[str, str]
    logged: str | None
    num_steps: int | None
    num_committed: int
    last_learned: int | None
    last_checkpoint: int | None
    best_checkpoint: str | None


@dataclass(frozen=True)
class Explanation:
    """Args:
    first_failure: of the last attempt; None: nothing failed in it.
    done: failures and reactions in the last attempt, in order.
    earlier: earlier attempts, a line each.
    now: what it does or waits for, or how it ended and how to continue.
    notes: what could not be read.
    """

    run: str
    state: State
    first_failure: FirstFailure | None
    done: Sequence[str]
    earlier: Sequence[str]
    standing: Standing
    now: Sequence[str]
    notes: Sequence[str]


def explain(facts: Facts) -> Explanation:
    last = facts.last_attempt
    state = state_of(facts, last)
    failure = first_failure(facts, last, state)
    return Explanation(
        run=facts.folder.resolve().name,
        state=state,
        first_failure=failure,
        done=_done(facts.of(last)),
        earlier=[_earlier(facts, attempt) for attempt in facts.numbers[:-1]],
        standing=Standing(
            attempts=len(facts.numbers),
            stages=_stages(facts),
            logged=facts.logged,
            num_steps=facts.num_steps,
            num_committed=facts.num_committed,
            last_learned=facts.last_learned,
            last_checkpoint=facts.last_checkpoint,
            best_checkpoint=facts.best_checkpoint,
        ),
        now=list(_now(facts, state, failure)),
        notes=facts.notes,
    )


def _stages(facts: Facts) -> dict[str, str]:
    ends = {event.stage: STAGE_ENDS[event.kind] for event in facts.events if event.kind in STAGE_ENDS}
    return dict.fromkeys(facts.stages, "not begun") | ends


def _done(events: Sequence[Event]) -> list[str]:
    lines = [f"{moment(event.time)}  {text}" for event in events if (text := _deed(event))]
    num_left_out = len(lines) - _MOST_DEEDS
    return lines if num_left_out <= 0 else [f"({num_left_out} earlier lines left out)", *lines[-_MOST_DEEDS:]]


def _deed(event: Event) -> str | None:
    def get(name: str) -> str:
        value = event.fields.get(name)
        if isinstance(value, dict):
            return "; ".join(f"{brief(key)} {brief(item)}" for key, item in value.items())
        return ", ".join(map(brief, value)) if isinstance(value, list) else brief(value)

    seconds = number(event.fields.get("seconds")) or 0.0
    relearned = f", learned again: {get('relearned')}" if "relearned" in event.fields else ""
    texts = {
        "restored": lambda: f"restored: {get('table')}",
        "failure": lambda: f"failed: {title(failure_of(event))}",
        "recovery": lambda: f"{get('action')}: {get('roles')} ({get('used')} of {get('budget')})",
        "recovered": lambda: f"recovered: {get('action')} took {duration(seconds)}, step {get('step')}" + relearned,
        "gave_up": lambda: f"gave up: {get('reason')}",
        "guard": lambda: (
            f"guard {get('guard')}, step {get('step')}: {get('metric')} {get('value')}, bound "
            f"{get('bound')}: {get('action')}"
        ),
        "pause_ended": lambda: f"the pause was ended, step {get('step')}",
        "stop_requested": lambda: f"asked to stop, step {get('step')}; last checkpoint: {get('saved')}",
        "stage_set_aside": lambda: f"results of {event.stage} set aside, to run it again: {get('folder')}",
        "waiting": lambda: brief(get("what")),
        "people_asked": lambda: f"asked people for {get('judgements')} judgements of {get('items')} items",
        "people_judged": lambda: (
            f"people gave {get('judgements')} judgements of {get('judged')} items; {get('reason')}"
        ),
    }
    return texts[event.kind]() if event.kind in texts else None


def _earlier(facts: Facts, attempt: int) -> str:
    state = state_of(facts, attempt)
    failure, end = first_failure(facts, attempt, state), end_of(facts.of(attempt))
    times = [event.time for event in facts.of(attempt)]
    began = moment(min([*times, *([facts.attempts[attempt]] if attempt in facts.attempts else [])]))
    parts = [f"attempt {attempt}, from {began}: {state}"]
    if failure is not None:
        parts.append(f"first: {title(failure)}")
    if end is not None and state != "stopped":
        parts.append(f"end: {end}")
    return "; ".join(parts)


def _now(facts: Facts, state: State, failure: FirstFailure | None) -> Iterator[str]:
    beat, events = facts.beat_of(facts.last_attempt), facts.of(facts.last_attempt)
    if state == "starting":
        began = duration(facts.now - facts.last_sign(facts.last_attempt))
        yield f"attempt {facts.last_attempt} began {began} ago; it checks its input, or waits for Ray: no heartbeat yet"
    elif state == "finished":
        if _stages(facts)[facts.stages[-1]] == "finished" or not events:
            yield "finished; there is nothing left to do"
        else:
            yield f"finished what its command was to do; the config has more stages, up to {facts.stages[-1]}"
            yield from _way_on(facts)
    elif beat is not None and state in ("running", "waiting", "paused", "frozen"):
        yield from _living(facts, state, beat)
        if events and events[-1].kind == "waiting":
            since = duration(facts.now - events[-1].time)
            yield f"{brief(events[-1].fields.get('what'))}, for {since}"
        if any(event.kind == "stop_requested" for event in events):
            yield "it was asked to stop: it saves and ends"
    else:
        yield from _dead(facts, state, beat, end_of(events))
        if failure is not None and failure.category in _LASTING:
            yield f"a {failure.category} error will recur: correct its cause first"
        yield from _way_on(facts)


def _living(facts: Facts, state: State, beat: Beat) -> Iterator[str]:
    age = duration(facts.now - beat.time)
    process = f"process {beat.pid} on {beat.host}"
    if state != "frozen":
        yield f"alive: {process}, last heartbeat {age} ago"
    elif beat.process == "stopped":
        yield f"frozen: {process} was stopped (SIGSTOP), last heartbeat {age} ago; `kill -CONT {beat.pid}` wakes it"
    else:
        yield f"frozen: {process} is there, its last heartbeat {age} ago; `py-spy dump --pid {beat.pid}` says why"
    yield from doing(beat)
    if beat.people is not None:
        yield from _people(beat.people, facts.now)
    if state == "paused":
        yield f"paused: {brief(beat.paused or facts.paused)}"
        yield f"to resume: rm {_path(facts, PAUSED_FILE)}; to end it: kill -TERM {beat.pid} (on {beat.host})"


def _people(wait: PeopleWait, now: float) -> Iterator[str]:
    since = "" if wait.since is None else f", for {duration(now - wait.since)}"
    until = "" if wait.until is None else f", until {moment(wait.until)} at the latest"
    if wait.missing is None or wait.judgements is None:
        yield f"waits for people: judgements of {brief(wait.batch)} are missing{since}{until}"
    else:
        of = wait.judgements + wait.missing
        yield f"waits for people: {wait.missing} of {of} judgements of {brief(wait.batch)} are missing{since}{until}"
    if wait.problem is not None:
        yield f"the judgements can't be counted now: {brief(wait.problem)}"
    store = shlex.quote(brief(wait.store))
    if wait.page is not None:
        yield f"page: {brief(wait.page)}; a link: rlhf label invite NAME --store {store} --address {brief(wait.page)}"
    yield f"to continue with what there is: rlhf label finish {shlex.quote(brief(wait.batch))} --store {store}"


def doing(beat: Beat) -> Iterator[str]:
    """The content of the heartbeat: stage, step, open phases, calls in progress with their deadlines."""
    if beat.stage:
        yield f"{beat.stage}, step {'none yet' if beat.step is None else beat.step}"
    if beat.phases:
        yield "phases: " + ", ".join(f"{brief(name)} for {duration(seconds)}" for name, seconds in beat.phases.items())
    calls = sorted(beat.waiting, key=lambda call: -call.seconds)
    for call in calls[:_MOST_CALLS]:
        rank = "" if call.rank is None else f" rank {call.rank}"
        deadline = "no deadline known" if call.deadline_s is None else f"deadline {duration(call.deadline_s)}"
        yield f"waits for {brief(call.role)}{rank}: {brief(call.operation)}, for {duration(call.seconds)}, {deadline}"
    if len(calls) > _MOST_CALLS:
        yield f"and for {len(calls) - _MOST_CALLS} more calls"


def _dead(facts: Facts, state: State, beat: Beat | None, end: str | None) -> Iterator[str]:
    attempt = facts.last_attempt
    if state == "stopped":
        yield f"stopped, as it was asked to: {end or 'attempt ' + str(attempt) + ' ended'}"
    elif state == "failed":
        yield f"failed: attempt {attempt} ended with: {end or (beat.ended if beat else None)}"
    elif beat is None:
        since = duration(facts.now - facts.last_sign(attempt))
        yield f"dead: attempt {attempt} left no end and no heartbeat; its last sign of life is {since} old"
    else:
        since = duration(facts.now - beat.time)
        yield f"dead: attempt {attempt} (process {beat.pid} on {beat.host}) left no end; last heartbeat {since} ago:"
        yield from (f"  {line}" for line in doing(beat))


def _way_on(facts: Facts) -> Iterator[str]:
    if facts.paused is not None:
        yield f"it was paused ({brief(facts.paused)}); first: rm {_path(facts, PAUSED_FILE)}"
    if facts.stages == ["replay"]:
        yield "to continue: give the same `rlhf replay` command again; it learns from the first step"
        return
    folder = facts.folder.resolve()
    overrides = [f"run.id={folder.name}", *([] if facts.is_at_root else [f"run.root={folder.parent}"])]
    yield f"to continue: rlhf run --config {_path(facts, CONFIG_FILE)} {shlex.join(overrides)}"
    if facts.logged is None:
        return
    first = facts.last_checkpoint or 0
    begin = f"checkpoint {first}" if first else "the start weights"
    end = max(first, facts.num_committed)
    again = f", learns steps {first} to {end - 1} again from the log" if end > first else ""
    sample = "" if end == facts.num_steps else f", samples from step {end} on"
    yield f"it begins with {begin}{again}{sample}"


def _path(facts: Facts, name: str) -> str:
    return shlex.quote(str(facts.folder / name))


def duration(seconds: float) -> str:
    """A duration in suitable units: 12 s, 5 min 3 s, 2 h 5 min."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
