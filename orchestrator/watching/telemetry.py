"""Reports of a running stage: metrics.jsonl, events.jsonl, trackers, Prometheus, console lines.

A line of metrics.jsonl is `{"stage", "kind", "step", "attempt", "time", "metrics"}`; kind is "step" or "evaluation".
Only finished steps have lines; rewinding a run removes the lines of undone steps.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from orchestrator.config.stages import OLD_KINDS
from orchestrator.data.outside_text import redacted
from orchestrator.errors import StorageError
from orchestrator.roles import Trackers
from orchestrator.run.storage import append_line, drop_torn_tail, replacing, writing
from orchestrator.watching.exposition import PrometheusEndpoint

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
_RECENT_STEPS = 10  # number of step times whose median estimates the time left

Record = Callable[[Mapping[str, float]], None]


class _Phases:
    """Wall time per phase. Concurrent tasks in one phase count once; open phases are split at `drain`."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._num_open: dict[str, int] = {}
        self._opened: dict[str, float] = {}
        self._since: dict[str, float] = {}
        self._seconds: dict[str, float] = {}

    def enter(self, name: str) -> None:
        if not self._num_open.get(name):
            self._opened[name] = self._since[name] = self._clock()
        self._num_open[name] = self._num_open.get(name, 0) + 1

    def leave(self, name: str) -> None:
        self._num_open[name] -= 1
        if not self._num_open[name]:
            self._add(name, self._clock())

    def drain(self) -> dict[str, float]:
        now = self._clock()
        for name, num_open in self._num_open.items():
            if num_open:
                self._add(name, now)
                self._since[name] = now
        seconds, self._seconds = self._seconds, {}
        return {f"time/{name}_s": value for name, value in seconds.items()}

    def open(self) -> dict[str, float]:
        """Seconds since each open phase was entered, independent of `drain`."""
        now = self._clock()
        return {name: now - self._opened[name] for name, num_open in self._num_open.items() if num_open}

    def _add(self, name: str, now: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since[name]


@dataclass(frozen=True)
class Shown:
    """A metric in the console line of a step.

    Args:
        metric: omitted if the step has no such metric.
        form: format string of its value.
        change: format string of the difference from the stage's first step, shown from the second step on.
        unless_zero: omit it if it is 0.
    """

    metric: str
    form: str
    change: str | None = None
    unless_zero: bool = False

    def text(self, metrics: Mapping[str, float], first: Mapping[str, float]) -> str | None:
        value = metrics.get(self.metric)
        if value is None or (self.unless_zero and not value):
            return None
        before = first.get(self.metric)
        change = "" if self.change is None or before is None else self.change.format(value - before)
        return self.form.format(value) + change


SECONDS = Shown("time/step_s", "{:.1f} s/step")
SHOWN = (
    Shown("reward/mean", "reward {:.2f}", change=" ({:+.2f})"),
    Shown("kl/per_response", "KL {:.2g}"),
    Shown("response/length_mean", "len {:.0f}"),
    Shown("tokens/generated_per_s", "{:.0f} tok/s"),
    SECONDS,
    Shown("reward/cut", "{:.0f} transcripts cut for the reward model", unless_zero=True),
)
"""Metrics of a stage that samples and learns."""


@dataclass(frozen=True)
class _Progress:
    """The content of a step's console line."""

    stage: str
    step: int
    num_steps: int | None
    metrics: Mapping[str, float]
    first: Mapping[str, float]
    seconds_left: float | None

    def line(self, shown: Sequence[Shown]) -> str:
        parts = [text for item in shown if (text := item.text(self.metrics, self.first)) is not None]
        if self.seconds_left is not None:
            parts.append(f"{clock_text(self.seconds_left)} left")
        number = f"{self.step + 1}/{self.num_steps}" if self.num_steps else f"{self.step + 1}"
        return "  ".join([f"{self.stage} {number}", *parts])


class Telemetry:
    """Writes the reports of one stage of a run. Later attempts continue its part of the files without repetition.

    Args:
        folder: the run's folder, which must exist.
        trackers: closed together with this.
        console: gets one line of text per step.
        stage: name of the stage; lines of other stages in the same file are not changed.
        num_steps: steps of the stage, for progress and time left.
        shown: metrics in the console line of a step.
        prometheus: endpoint to update; its owner closes it.
        clock, wall_clock: monotonic seconds and seconds since the epoch.
        fence: called before metrics are written; raises if a newer attempt is writing the run.

    Methods that write raise StorageError, which names the file.
    """

    def __init__(  # noqa: PLR0913  parts are handed in
        self,
        folder: Path,
        run_id: str,
        attempt: int,
        trackers: Sequence[Trackers] = (),
        console: Callable[[str], None] | None = None,
        *,
        stage: str = "rl",
        num_steps: int | None = None,
        shown: Sequence[Shown] = SHOWN,
        prometheus: PrometheusEndpoint | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        fence: Callable[[], None] = lambda: None,
    ) -> None:
        self._folder, self._run_id, self._attempt = folder, run_id, attempt
        self._trackers, self._console, self._prometheus = tuple(trackers), console, prometheus
        self._stage, self._num_steps, self._shown = stage, num_steps, tuple(shown)
        self._clock, self._wall_clock = clock, wall_clock
        self._fence = fence
        self._phases = _Phases(clock)
        self._step: int | None = None
        self._step_seconds: deque[float] = deque(maxlen=_RECENT_STEPS)
        for name in (METRICS_FILE, EVENTS_FILE):
            _repair(folder / name)
        self._total_tokens = 0.0
        self._people: Mapping[str, Any] | None = None
        self._first: Mapping[str, float] = {}
        self._continue_from(read_lines(folder / METRICS_FILE))

    @contextmanager
    def step(self, step: int) -> Iterator[Record]:
        """Collects the metrics recorded inside and writes them on a clean exit, but not after an exception.

        Values of `busy/<role>_s` add up, others replace. Raises ValueError for a value that is not a number.
        """
        collected: dict[str, float] = {}
        started = self._clock()
        self._step = step

        def record(metrics: Mapping[str, float]) -> None:
            for name, value in metrics.items():
                before = collected.get(name, 0.0) if name.startswith("busy/") else 0.0
                collected[name] = before + float(value)

        yield record
        seconds = self._clock() - started
        collected["time/step_s"] = seconds
        self._step_seconds.append(seconds)
        collected["memory/coordinator_rss_bytes"] = float(resident_bytes())
        collected |= self._phases.drain()
        collected |= {name: value for name, value in _derived(collected).items() if name not in collected}
        tokens = collected.get("tokens/generated", 0.0)
        self._total_tokens += tokens
        collected["tokens/total"] = self._total_tokens
        self._write("step", step, collected, steps=1, tokens=tokens)
        self._show_progress(step, collected)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts wall time for time/<name>_s of the next line. Phases may nest, overlap and lie between steps."""
        self._phases.enter(name)
        try:
            yield
        finally:
            self._phases.leave(name)

    def evaluation(self, version: int, metrics: Mapping[str, float]) -> None:
        """Writes metrics of a version of the weights, rather than of a step; replaces earlier ones of the version."""
        self._rewrite(lambda line: not (line["kind"] == "evaluation" and line["step"] == version))
        collected = {name: float(value) for name, value in metrics.items()} | self._phases.drain()
        self._write("evaluation", version, collected, steps=0, tokens=0.0)

    def evaluated(self) -> set[int]:
        """Versions with written evaluations."""
        lines = read_lines(self._folder / METRICS_FILE)
        return {line["step"] for line in lines if line["stage"] == self._stage and line["kind"] == "evaluation"}

    def num_steps_written(self) -> int:
        """Number of written steps of this stage."""
        lines = read_lines(self._folder / METRICS_FILE)
        steps = [line["step"] for line in lines if line["stage"] == self._stage and line["kind"] == "step"]
        return max(steps, default=-1) + 1

    def rewind(self, step: int) -> None:
        """Removes the lines of steps from `step` on, and of evaluations of versions after `step`."""
        self._rewrite(lambda line: line["step"] < step + (line["kind"] == "evaluation"))
        self._continue_from(read_lines(self._folder / METRICS_FILE))

    def set_aside(self, folder: Path) -> None:
        """Moves all lines of this stage from the run's metrics to those in `folder`."""
        self.event("stage_set_aside", folder=str(folder))
        lines = [line for line in read_lines(self._folder / METRICS_FILE) if line["stage"] == self._stage]
        if lines:
            with writing(folder / METRICS_FILE), (folder / METRICS_FILE).open("a", encoding="utf-8") as stream:
                stream.writelines(map(_as_text, lines))
        self._rewrite(lambda line: False)

    def now(self) -> dict[str, Any]:
        """The current activity: stage, step (the last started, None before the first), seconds by open phase, what
        people are waited for."""
        return {"stage": self._stage, "step": self._step, "phases": self._phases.open(), "people": self._people}

    def waits_for_people(self, what: Mapping[str, Any] | None, metrics: Mapping[str, float]) -> None:
        """Shows in the heartbeat and at the endpoint that the stage waits for people; writes no line.

        Args:
            what: content of the heartbeat; None: it waits no longer.
            metrics: values of this moment.
        """
        self._people = what
        if self._prometheus is not None:
            self._prometheus.update(metrics, steps=0, tokens=0.0)

    def event(self, kind: str, **fields: Any) -> None:
        """Appends one line to events.jsonl: time, attempt, stage, kind and the fields (values that JSON can hold)."""
        head = {"time": self._wall_clock(), "attempt": self._attempt, "stage": self._stage, "kind": kind}
        _append_line(self._folder / EVENTS_FILE, {**head, **fields})

    def tell(self, line: str, kind: str, **fields: Any) -> None:
        """Appends an event and prints a line about it to the console."""
        self.event(kind, **fields)
        if self._console is not None:
            self._console(line)

    def restored(self, table: Mapping[str, str]) -> None:
        """Reports the state from which the run continues."""
        self.event("restored", table=dict(table))
        if self._console is not None:
            width = max(map(len, table))
            lines = [f"  {name:<{width}}  {whence}" for name, whence in table.items()]
            self._console("\n".join(["continues with", *lines]))

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, kind: str, step: int, collected: dict[str, float], *, steps: int, tokens: float) -> None:
        self._fence()
        finite = {name: value for name, value in collected.items() if math.isfinite(value)}
        num_lost = float(len(collected) - len(finite))
        written: dict[str, float | None] = {name: finite.get(name) for name in collected}
        head = {"stage": self._stage, "kind": kind, "step": step, "attempt": self._attempt, "time": self._wall_clock()}
        _append_line(self._folder / METRICS_FILE, {**head, "metrics": {**written, "telemetry/non_finite": num_lost}})
        finite["telemetry/non_finite"] = num_lost
        for tracker in self._trackers:
            tracker.log(step, finite)
        if self._prometheus is not None:
            self._prometheus.update({**collected, "telemetry/non_finite": num_lost}, steps=steps, tokens=tokens)

    def _show_progress(self, step: int, metrics: Mapping[str, float]) -> None:
        first = self._first
        self._first = first or dict(metrics)
        if self._console is None:
            return
        left = None
        if self._num_steps is not None and step + 1 < self._num_steps:
            left = (self._num_steps - step - 1) * statistics.median(self._step_seconds)
        self._console(_Progress(self._stage, step, self._num_steps, metrics, first, left).line(self._shown))

    def _continue_from(self, lines: Sequence[Mapping[str, Any]]) -> None:
        steps = [line["metrics"] for line in lines if line["stage"] == self._stage and line["kind"] == "step"]
        self._total_tokens = (steps[-1].get("tokens/total") or 0.0) if steps else 0.0
        self._first = {name: value for name, value in steps[0].items() if value is not None} if steps else {}

    def _rewrite(self, keep: Callable[[Mapping[str, Any]], bool]) -> None:
        path = self._folder / METRICS_FILE
        lines = read_lines(path)
        kept = [line for line in lines if line["stage"] != self._stage or keep(line)]
        if len(kept) != len(lines):
            with replacing(path) as temporary:
                temporary.write_text("".join(map(_as_text, kept)), encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSONL file that may still be growing, without an incomplete last line. No file: no lines.

    Raises StorageError, which names the first line that this module can't have written.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"{path} can't be read ({error.strerror}).") from error
    lines = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            lines.append(_checked(json.loads(line)))
        except (OverflowError, RecursionError, TypeError, ValueError):
            raise StorageError(f"{path}:{number} is damaged. Remove the line and start again.") from None
    return lines


def _checked(line: Any) -> dict[str, Any]:
    """Returns `line`. Raises ValueError, or another error of json or math, if this module can't have written it."""
    match line:
        case {"stage": str(), "kind": str() as kind, "attempt": int(), "time": int() | float()}:
            of_metrics = kind in ("step", "evaluation")
        case _:
            raise ValueError
    match line:
        case {"step": int(), "metrics": dict() as metrics} if of_metrics:
            if not all(value is None or math.isfinite(value) for value in metrics.values()):
                raise ValueError
        case _ if of_metrics:
            raise ValueError
    _as_text(line).encode()
    return {**line, "stage": OLD_KINDS.get(line["stage"], line["stage"])}


def clock_text(seconds: float) -> str:
    """61 becomes 1:01; an hour or more becomes h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def resident_bytes() -> int:
    """Resident memory of this process; 0 on systems without /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _derived(metrics: Mapping[str, float]) -> dict[str, float]:
    """Idle shares and token rates, derived from recorded metrics."""
    derived: dict[str, float] = {}
    step_seconds = metrics["time/step_s"]
    for name, busy in metrics.items():
        if name.startswith("busy/") and step_seconds > 0.0:
            role = name.removeprefix("busy/").removesuffix("_s")
            derived[f"idle/{role}"] = max(0.0, 1.0 - busy / step_seconds)
    for what, phase in (("generated", "generate"), ("learned", "learn")):
        tokens, seconds = metrics.get(f"tokens/{what}"), metrics.get(f"time/{phase}_s")
        if tokens is not None and seconds:
            derived[f"tokens/{what}_per_s"] = tokens / seconds
    return derived


def _as_text(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"


def _append_line(path: Path, line: Mapping[str, Any]) -> None:
    append_line(path, redacted(_as_text(line)).removesuffix("\n"))


def _repair(path: Path) -> None:
    """Removes an incomplete last line, left by a killed attempt."""
    try:
        drop_torn_tail(path)
    except OSError as error:
        raise StorageError(f"{path} can't be repaired ({error.strerror}); fix its permissions.") from error
