"""Runs work on hostile input in a separate process; measures its result, time and memory."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

from orchestrator.errors import RlhfError
from tests.deadlines import scaled

MAX_PEAK_BYTES = 10**9  # per input: what the process that reads it takes for it, and its children
MAX_CPU_S = scaled(30.0)
_PROTECTION_BYTES = 3 * 2**30  # the process gets no more memory, so that a fault does not affect the machine

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["orchestrator.data.readers", "orchestrator.config.loader", "tests.chaos.bombs"])


@dataclass(frozen=True)
class Outcome:
    """value: it was read. refused: an RlhfError. raised, died, hung: a fault of this program."""

    kind: Literal["value", "refused", "raised", "died", "hung"]
    detail: str
    cpu_s: float
    peak_bytes: int

    def require_harmless(self, name: str) -> None:
        assert self.kind in ("value", "refused"), f"{name}: {self.kind}: {self.detail}"
        assert self.peak_bytes < MAX_PEAK_BYTES, f"{name}: {self.peak_bytes / 1e6:.0f} MB, {self.detail}"
        assert self.cpu_s < MAX_CPU_S, f"{name}: {self.cpu_s:.1f} s of CPU, {self.detail}"
        assert len(self.detail) < 20_000 and self.detail.encode() is not None


def bounded(work: Callable[..., object], args: tuple[Any, ...], *, limit_s: float) -> Outcome:
    """Runs importable work in a process that is killed with its children after `limit_s`."""
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_run, args=(sender, work, args))
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit_s):
            return Outcome("hung", f"no end within {limit_s:.0f} s", limit_s, 0)
        found: Outcome = receiver.recv()
        return found
    except EOFError:
        process.join(limit_s)
        return Outcome("died", f"exit code {process.exitcode}", 0.0, 0)
    finally:
        receiver.close()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()


def _run(sender: Connection, work: Callable[..., object], args: tuple[Any, ...]) -> None:
    os.setsid()
    resource.setrlimit(resource.RLIMIT_DATA, (_PROTECTION_BYTES, _PROTECTION_BYTES))
    kind: Literal["value", "refused", "raised"] = "value"
    detail = ""
    # The server that forks this process is shared by all tests of a process, and others of them load torch into it.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    try:
        work(*args)
    except RlhfError as error:
        kind, detail = "refused", str(error)
    except BaseException:  # noqa: BLE001  any error is reported
        kind, detail = "raised", traceback.format_exc()
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = time.process_time() - started + children.ru_utime + children.ru_stime
    sender.send(Outcome(kind, detail, cpu_s, (own.ru_maxrss - before + children.ru_maxrss) * 1024))
