"""Requests to stop: Ctrl-C, SIGTERM, and the SIGHUP of a closed terminal. Every phase of a command reacts to them.

end_at_once      prints one line and exits, for a command that has not started its work
interrupt        a stop raises KeyboardInterrupt in the command
held             a stop waits for the end of the body, which must not be interrupted
Cancelling       a stop cancels an asyncio task, which then saves its state
end_within       a deadline for all of that

A signal that was ignored when the program started, as nohup does with SIGHUP, stays ignored.

Python runs a handler between two of its own instructions. A signal that arrives right before a call that blocks would
therefore wait until that call returns; a thread sends a second one, which interrupts the call.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from time import monotonic, sleep
from types import FrameType
from typing import Any

INTERRUPTED = 130  # the code that shells report for a program ended by Ctrl-C
STOPPED = "stopped; what was committed is safe, and the same run.id continues from it."
# A second Ctrl-C is deliberate; a terminal that closes sends SIGHUP twice and means one stop.
AGAIN_S = 1.0

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_WAKING = signal.SIGURG  # only interrupts a call that blocks
_WAKE_AFTER_S = (0.1, 1.0)
Handler = Callable[[int, FrameType | None], Any]


def end_at_once() -> None:
    """From now on a stop ends the process."""
    _handle(_end)


def interrupt() -> None:
    """From now on a stop raises KeyboardInterrupt."""
    _handle(signal.default_int_handler)


@contextmanager
def held() -> Iterator[None]:
    """Stops wait for the end of the body and raise KeyboardInterrupt there."""
    came: list[int] = []
    with _handled(lambda number, frame: came.append(number)):
        yield
    if came:
        raise KeyboardInterrupt


@contextmanager
def ending_at_once() -> Iterator[None]:
    """A stop ends the process while the body runs. For imports: an interrupted import can raise any error."""
    with _handled(_end):
        yield


class Cancelling:
    """While its context is open, a stop cancels the task that `begin` names.

    A repeated SIGTERM or SIGHUP has no effect; a second Ctrl-C cancels again, which interrupts saving.

    Args:
        grace_s: the process ends this long after the first stop, in any case.
    """

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._task: asyncio.Task[None] | None = None
        self._first: float | None = None

    def begin(self, task: asyncio.Task[None]) -> None:
        self._task = task
        if self._first is not None:
            task.cancel()

    @contextmanager
    def listening(self) -> Iterator[None]:
        with _handled(self._stop):
            yield

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        if self._first is None:
            self._first = monotonic()
            end_within(self._grace_s, "it did not end in time after the request to stop.")
        elif number != signal.SIGINT or monotonic() - self._first < AGAIN_S:
            return
        if self._task is not None:
            self._task.get_loop().call_soon_threadsafe(self._task.cancel)


def end_within(seconds: float, why: str | None = None) -> None:
    """Ends the process with INTERRUPTED after this time, unless it has ended: for threads and libraries that hang."""

    def end() -> None:
        if why is not None:
            _write(why)
        os._exit(INTERRUPTED)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def _end(_number: int, _frame: FrameType | None) -> None:
    _write(STOPPED)
    os._exit(INTERRUPTED)


def _write(line: str) -> None:
    try:
        sys.stdout.flush()
        os.write(2, f"{line}\n".encode())
    except (OSError, ValueError, RuntimeError):
        pass  # the terminal is gone, or the signal came in the middle of a write


def _handle(handler: Handler) -> None:
    if threading.current_thread() is threading.main_thread():
        _wake_blocked_calls()
        for number in _listened():
            signal.signal(number, handler)


@cache
def _wake_blocked_calls() -> None:
    came, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    signal.signal(_WAKING, lambda number, frame: None)
    main = threading.get_ident()

    def wake() -> None:
        while numbers := os.read(came, 64):
            if set(numbers) != {_WAKING}:
                for pause_s in _WAKE_AFTER_S:
                    sleep(pause_s)
                    signal.pthread_kill(main, _WAKING)

    threading.Thread(target=wake, name="stops", daemon=True).start()


@contextmanager
def _handled(handler: Handler) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread sees signals
        return
    before = {number: signal.getsignal(number) for number in _listened()}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _listened() -> list[signal.Signals]:
    return [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
