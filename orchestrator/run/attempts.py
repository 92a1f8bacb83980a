"""Attempts of a run. Each is one process of the driver; a new one starts only after the previous one has ended.

attempts/001    its process: host, machine (boot id and PID namespace), pid, start time

An attempt is alive while its process runs on this machine or, seen from another machine, while its heartbeat changes.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import psutil

from orchestrator.errors import CapacityError
from orchestrator.run.storage import reading, writing
from orchestrator.watching.heartbeat import EVERY_S, HEARTBEAT_FILE

ATTEMPTS = "attempts"
# A driver under load may miss heartbeats, and a network file system may show them late.
SILENT_S = 6 * EVERY_S
_POLL_S = 1.0
_START_TOLERANCE_S = 10.0  # the kernel's clock may be changed while a process runs


@dataclass(frozen=True)
class Owner:
    """The process of an attempt. Unknown fields are None."""

    host: str | None = None
    machine: str | None = None
    pid: int | None = None
    started: float | None = None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" if self.pid else "an unknown process"

    def is_alive(self) -> bool | None:
        """None: unknown on this machine. This process counts as dead, because it asks in order to start an attempt."""
        if self.machine is None or self.pid is None or self.machine != _machine():
            return None
        if self.pid == os.getpid():
            return False
        try:
            process = psutil.Process(self.pid)
            is_same = self.started is None or abs(process.create_time() - self.started) < _START_TOLERANCE_S
            return bool(is_same and process.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False
        except psutil.AccessDenied:
            return None


def numbers(folder: Path) -> list[int]:
    """Numbers of the attempts in `folder`; other files, such as .DS_Store, are ignored."""
    return [int(entry.name) for entry in folder.iterdir() if re.fullmatch(r"[0-9]{3,9}", entry.name)]


def claim(run: Path, *, wait_s: float, tell: Callable[[str], None]) -> int:
    """Starts the next attempt of the run in folder `run`; returns its number. If several processes try, one succeeds.

    Raises:
        CapacityError: the last attempt is alive and has not ended within `wait_s`.
        StorageError: the folder can't be read or written.
    """
    folder = run / ATTEMPTS
    while True:
        with reading(folder):
            last = max(numbers(folder), default=0)
        if last:
            _await_end(run, last, wait_s, tell)
        with suppress(FileExistsError), writing(folder), (folder / f"{last + 1:03d}").open("x") as file:
            json.dump(asdict(_this_process()), file)
            return last + 1


def _await_end(run: Path, attempt: int, wait_s: float, tell: Callable[[str], None]) -> None:
    """Waits until the attempt has ended. Raises CapacityError if it is still alive after `wait_s`."""
    begun = last_change = monotonic()
    sign = _sign(run, attempt)
    was_told = False
    while True:
        now, fresh = monotonic(), _sign(run, attempt)
        owner = _owner(run / ATTEMPTS / f"{attempt:03d}")  # read each time: its process may not have written it yet
        if fresh is not None and fresh.get("ended"):
            return
        is_alive = owner.is_alive()
        if is_alive is False:
            return
        seen_alive = is_alive or fresh != sign
        if fresh != sign:
            sign, last_change = fresh, now
        if is_alive is None and now - last_change > SILENT_S:
            return
        if seen_alive and now - begun > wait_s:
            raise CapacityError(
                f"run {run.name} is being written by attempt {attempt} ({owner}), which is alive, and two attempts "
                f"can't write one run. Inspect it with `rlhf why {run}`. Stop it and repeat this command to continue "
                "the run, or give another run.id (a replay: another --to)."
            )
        if not was_told:
            what = "to end" if is_alive else "for a sign of life"
            tell(f"attempt {attempt} of this run ({owner}) has not reported its end; waiting {what} ...")
            was_told = True
        sleep(_POLL_S)


def _sign(run: Path, attempt: int) -> dict[str, Any] | None:
    """The heartbeat of an attempt. None: it is missing, damaged or from another attempt."""
    with suppress(OSError, ValueError, RecursionError):
        beat = json.loads((run / HEARTBEAT_FILE).read_text(encoding="utf-8"))
        if isinstance(beat, dict) and beat.get("attempt") == attempt:
            return beat
    return None


def _owner(path: Path) -> Owner:
    """The process of an attempt. Unknown if the file is damaged or empty (earlier versions wrote empty files)."""
    with suppress(OSError, ValueError, TypeError, RecursionError):
        owner = Owner(**json.loads(path.read_text(encoding="utf-8")))
        if isinstance(owner.pid, int) and isinstance(owner.started, (int, float)):
            return owner
    return Owner()


def _this_process() -> Owner:
    return Owner(socket.gethostname(), _machine(), os.getpid(), psutil.Process().create_time())


def _machine() -> str | None:
    """Boot id and PID namespace. None: the kernel does not provide them."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None
