"""The facts of a run's progress and failures, as values: reader.py reads them, explain.py explains them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Process = Literal["runs", "stopped", "gone", "unknown"]


@dataclass(frozen=True)
class Event:
    time: float
    attempt: int
    stage: str
    kind: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Call:
    """A call to an actor that was in progress. `deadline_s`: None if unknown."""

    role: str
    rank: int | None
    operation: str
    seconds: float
    deadline_s: float | None


@dataclass(frozen=True)
class PeopleWait:
    """A wait for judgements of people.

    Args:
        since, until: times; `until` None: there is no deadline.
        page: address of the page; None: the run does not serve it.
        problem: why the judgements can't be counted at the moment.
    """

    batch: str
    store: str
    judgements: int | None
    missing: int | None
    since: float | None
    until: float | None
    page: str | None
    problem: str | None


@dataclass(frozen=True)
class Beat:
    """The last heartbeat. `process`: the state of the process that wrote it; "unknown" from another host."""

    time: float
    attempt: int
    pid: int | None
    host: str
    stage: str
    step: int | None
    phases: Mapping[str, float]
    waiting: Sequence[Call]
    paused: str | None
    ended: str | None
    process: Process
    people: PeopleWait | None = None


@dataclass(frozen=True)
class Facts:
    """Args:
    now: seconds since the epoch at which the folder was read.
    is_at_root: the config's run.root leads here from the working folder.
    attempts: number to the time at which it started.
    logged: the last stage that learns in steps from a log, to which steps and checkpoints belong; None: there is none.
    num_committed: steps in the log, from step 0 to the first gap.
    last_learned: last step with a line in metrics.jsonl.
    last_checkpoint: step of the newest complete checkpoint, which is the number of steps learned before it.
    best_checkpoint: its step and why it is the best by evaluation; None: there is none.
    paused: text of the file PAUSED; None without it.
    notes: what could not be read.
    """

    folder: Path
    now: float
    is_at_root: bool
    stages: Sequence[str]
    logged: str | None
    num_steps: int | None
    events: Sequence[Event]
    attempts: Mapping[int, float]
    num_committed: int
    last_learned: int | None
    last_checkpoint: int | None
    best_checkpoint: str | None
    beat: Beat | None
    paused: str | None
    notes: Sequence[str]

    @property
    def numbers(self) -> list[int]:
        """Attempts that left a trace, in order."""
        return sorted({*self.attempts, *(event.attempt for event in self.events)})

    @property
    def last_attempt(self) -> int:
        return max(self.numbers, default=1)

    def of(self, attempt: int) -> list[Event]:
        return [event for event in self.events if event.attempt == attempt]

    def beat_of(self, attempt: int) -> Beat | None:
        return self.beat if self.beat is not None and self.beat.attempt == attempt else None

    def last_sign(self, attempt: int) -> float:
        """The time of the attempt's start or last event, without its heartbeat."""
        return max([self.attempts.get(attempt, 0.0), *(event.time for event in self.of(attempt))])
