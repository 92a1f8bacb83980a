"""A run's heartbeat: heartbeat.json, replaced every few seconds while the driver's event loop runs.

It distinguishes a live run from a dead one and shows the last activity of a dead run. Nothing is restored from it.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from orchestrator.concurrency import cancel
from orchestrator.data.outside_text import redacted

HEARTBEAT_FILE = "heartbeat.json"
EVERY_S = 5.0
FINISHED, STOPPED = "finished", "stopped"
_NOTHING: Mapping[str, Any] = {"stage": None, "step": None, "phases": {}, "waiting": [], "paused": None, "people": None}


class Heartbeat:
    """Writes heartbeats while its body runs, and a last one with the reason of its end: finished, stopped or the error.

    A full disk or a missing folder loses heartbeats but does not stop the run. An attempt does not replace the
    heartbeat of a newer one.

    Args:
        folder: the run's folder.
        read: returns the current activity: any of stage, step, phases (seconds by name), paused, waiting (role,
            rank, operation, seconds, deadline_s of each pending call), and people (batch, store, items, judgements,
            missing, since, until, page, problem of a wait for people). Called on the event loop.
    """

    def __init__(
        self,
        folder: Path,
        attempt: int,
        read: Callable[[], Mapping[str, Any]],
        *,
        wall_clock: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._path = folder / HEARTBEAT_FILE
        self._temporary = folder / f".{HEARTBEAT_FILE}.{attempt}.tmp"
        self._attempt, self._read = attempt, read
        self._wall_clock, self._sleep = wall_clock, sleep

    async def __aenter__(self) -> Heartbeat:
        self._beat(None)
        self._beating = asyncio.create_task(self._beat_on())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await cancel([self._beating])
        finally:
            self._beat(_reason(error))

    async def _beat_on(self) -> None:
        while True:
            await self._sleep(EVERY_S)
            self._beat(None)

    def _beat(self, ended: str | None) -> None:
        head = {"time": self._wall_clock(), "attempt": self._attempt, "pid": os.getpid(), "host": socket.gethostname()}
        text = json.dumps({**head, **_NOTHING, **self._read(), "ended": ended}, indent=1) + "\n"
        with suppress(OSError):
            if self._is_superseded():
                return
            # Not synced: it is not needed after a power failure.
            self._temporary.write_text(redacted(text), encoding="utf-8")
            self._temporary.replace(self._path)

    def _is_superseded(self) -> bool:
        try:
            return bool(json.loads(self._path.read_text(encoding="utf-8"))["attempt"] > self._attempt)
        except (FileNotFoundError, ValueError, LookupError, TypeError):
            return False


def _reason(error: BaseException | None) -> str:
    if error is None:
        return FINISHED
    if isinstance(error, (KeyboardInterrupt, asyncio.CancelledError)):
        return STOPPED
    return f"{type(error).__name__}: {error}"
