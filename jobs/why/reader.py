"""Reads the facts of a run's progress and failures from its folder: never fails on a broken run, and changes nothing.

Damaged files are left out and noted.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil

from jobs.stages.table import logged_name, logged_place, named_kinds, num_steps_of
from jobs.why.facts import Beat, Call, Event, Facts, PeopleWait, Process
from orchestrator.config.loader import translated
from orchestrator.config.stages import OLD_KINDS
from orchestrator.config.yaml_text import parse_yaml
from orchestrator.errors import StorageError
from orchestrator.run.attempts import ATTEMPTS
from orchestrator.run.checkpoints import MARKER, read_best
from orchestrator.run.experience_log import num_committed
from orchestrator.run.folder import CONFIG_FILE, storage_root
from orchestrator.watching.guards import PAUSED_FILE
from orchestrator.watching.heartbeat import HEARTBEAT_FILE
from orchestrator.watching.telemetry import EVENTS_FILE, METRICS_FILE

T = TypeVar("T")

_TAIL_BYTES = 4 << 20  # of a JSONL file; older lines explain nothing
_LARGEST = 32503680000.0  # the year 3000 in seconds; greater numbers are damage


def read_facts(folder: Path, now: float) -> Facts | None:
    """None: no such folder, or it holds no files of a run."""
    reader = _Reader(folder)
    no_lines: list[dict[str, Any]] = []
    empty: dict[str, Any] = {}
    traces = (CONFIG_FILE, ATTEMPTS, EVENTS_FILE, METRICS_FILE, HEARTBEAT_FILE)
    if not any(reader.get(name, lambda path: path.exists(), False) for name in traces):
        return None
    config = reader.get(CONFIG_FILE, lambda path: translated(_mapping(parse_yaml, path)), empty)
    run = config.get("run")
    root = run.get("root") if isinstance(run, dict) else None
    events = [event for line in reader.get(EVENTS_FILE, reader.lines, no_lines) if (event := _event(line))]
    begun = next(filter(None, map(stages_of, reversed(events))), ["rl"])
    kinds = named_kinds(config.get("stages")) or {name: name for name in begun}
    logged = logged_name(kinds)
    place = logged_place(folder, kinds)
    return Facts(
        folder=folder,
        now=now,
        is_at_root=isinstance(root, str) and storage_root(Path(root)).resolve() == folder.resolve().parent,
        stages=list(kinds),
        logged=logged,
        num_steps=None if logged is None else whole(num_steps_of(kinds[logged], config)),
        events=events,
        attempts=reader.get(ATTEMPTS, _attempts, {}),
        num_committed=reader.get(str((place / "log").relative_to(folder)), num_committed, 0),
        last_learned=_last_learned(reader.get(METRICS_FILE, reader.lines, no_lines), logged),
        last_checkpoint=reader.get(str((place / "checkpoints").relative_to(folder)), _last_checkpoint, None),
        best_checkpoint=None if (best := read_best(place / "checkpoints")) is None else str(best),
        beat=_beat(reader.get(HEARTBEAT_FILE, lambda path: _mapping(json.loads, path), empty)),
        paused=reader.get(PAUSED_FILE, lambda path: path.read_text(encoding="utf-8", errors="replace"), None),
        notes=reader.notes,
    )


class _Reader:
    """Reads parts of a folder, each with a value to fall back on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.notes: list[str] = []

    def get(self, name: str, read: Callable[[Path], T], otherwise: T) -> T:
        try:
            return read(self._folder / name)
        except (FileNotFoundError, NotADirectoryError):
            return otherwise
        except (OSError, StorageError, ValueError, RecursionError) as error:
            self.notes.append(f"{name} can't be read ({type(error).__name__}).")
            return otherwise

    def lines(self, path: Path) -> list[dict[str, Any]]:
        """Objects of a JSONL file's last part. An incomplete last line may still be growing; other damage is noted."""
        with path.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, 2) - _TAIL_BYTES))
            is_cut = stream.tell() > 0
            *lines, _ = stream.read().decode("utf-8", errors="replace").split("\n")
        found = [_object(line) for line in lines[is_cut:]]
        objects = [item for item in found if item is not None]
        if len(objects) < len(found):
            self.notes.append(f"{path.name}: {len(found) - len(objects)} damaged lines are left out.")
        return objects


def number(value: Any) -> float | None:
    """A number of sensible size, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < _LARGEST else None


def whole(value: Any) -> int | None:
    """A whole number, or None."""
    return value if isinstance(value, int) and number(value) is not None else None


def stages_of(event: Event) -> list[str]:
    """All stages of the attempt, from an event of a stage's start; other events name none."""
    return _names(event.fields.get("stages")) if event.kind == "stage_started" else []


def _names(value: Any) -> list[str]:
    return list(named_kinds(value))


def _object(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _mapping(load: Callable[[str], Any], path: Path) -> dict[str, Any]:
    found = load(path.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}


def _event(line: Mapping[str, Any]) -> Event | None:
    time, attempt = number(line.get("time")), whole(line.get("attempt"))
    if time is None or time < 0 or attempt is None:
        return None
    fields = {name: value for name, value in line.items() if name not in ("time", "attempt", "stage", "kind")}
    return Event(time, attempt, _stage(line), str(line.get("kind")), fields)


def _attempts(folder: Path) -> dict[int, float]:
    return {int(path.name): path.stat().st_mtime for path in sorted(folder.iterdir()) if path.name.isdecimal()}


def _last_learned(lines: Sequence[Mapping[str, Any]], stage: str | None) -> int | None:
    steps = (line for line in reversed(lines) if _stage(line) == stage and line.get("kind") == "step")
    return next((step for line in steps if (step := whole(line.get("step"))) is not None), None)


def _stage(line: Mapping[str, Any]) -> str:
    name = str(line.get("stage"))
    return OLD_KINDS.get(name, name)


def _last_checkpoint(folder: Path) -> int | None:
    complete = (path.parent.name.removeprefix("step-") for path in folder.glob(f"step-*/{MARKER}"))
    return max((int(name) for name in complete if name.isdecimal()), default=None)


def _beat(line: Mapping[str, Any]) -> Beat | None:
    time, attempt = number(line.get("time")), whole(line.get("attempt"))
    if time is None or time < 0 or attempt is None:
        return None
    pid, host = whole(line.get("pid")), str(line.get("host"))
    phases, waiting = line.get("phases"), line.get("waiting")
    return Beat(
        time=time,
        attempt=attempt,
        pid=pid,
        host=host,
        stage=_stage(line) if line.get("stage") else "",
        step=whole(line.get("step")),
        phases={name: number(value) or 0.0 for name, value in phases.items()} if isinstance(phases, dict) else {},
        waiting=[_call(item) for item in waiting if isinstance(item, dict)] if isinstance(waiting, list) else [],
        paused=str(line["paused"]) if line.get("paused") else None,
        ended=str(line["ended"]) if line.get("ended") else None,
        process=_process(pid, host, time),
        people=_people(people) if isinstance(people := line.get("people"), dict) else None,
    )


def _people(item: Mapping[str, Any]) -> PeopleWait:
    return PeopleWait(
        str(item.get("batch")),
        str(item.get("store")),
        whole(item.get("judgements")),
        whole(item.get("missing")),
        _moment(item.get("since")),
        _moment(item.get("until")),
        str(item["page"]) if item.get("page") else None,
        str(item["problem"]) if item.get("problem") else None,
    )


def _moment(value: Any) -> float | None:
    found = number(value)
    return found if found is not None and found >= 0 else None


def _call(item: Mapping[str, Any]) -> Call:
    seconds = number(item.get("seconds")) or 0.0
    role, operation = str(item.get("role")), str(item.get("operation"))
    return Call(role, whole(item.get("rank")), operation, seconds, number(item.get("deadline_s")))


def _process(pid: int | None, host: str, time: float) -> Process:
    if pid is None or host != socket.gethostname():
        return "unknown"
    try:
        process = psutil.Process(pid)
        # The id may have been given to another process since.
        if process.create_time() > time or process.status() == psutil.STATUS_ZOMBIE:
            return "gone"
        return "stopped" if process.status() == psutil.STATUS_STOPPED else "runs"
    except psutil.AccessDenied:
        return "unknown"
    except (psutil.Error, ValueError, OverflowError):
        return "gone"
