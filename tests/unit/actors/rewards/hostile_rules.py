"""Rules that misbehave. The rules' process imports this module, so it needs only the standard library.

`act` does what its response says; numbers are returned unchanged.
"""

from __future__ import annotations

import ctypes
import fractions
import mmap
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

MOST_FORKS = 2000
DOUBLINGS = 9
LIFETIME_S = 60.0


class Unshowable(Exception):
    def __str__(self) -> str:
        raise SystemExit(0)


class Lying(dict[str, float]):
    def items(self) -> Any:
        raise SystemExit


def raising(error: BaseException) -> Callable[[], Any]:
    def act() -> None:
        raise error

    return act


def _recurse() -> float:
    return _recurse()


def _allocate() -> float:
    held = []
    while True:
        held.append(bytearray(1 << 24))


def _allocate_in_a_child() -> float:
    code = "held = [b'1' * (1 << 24) for _ in iter(int, 1)]"
    return float(subprocess.run([sys.executable, "-c", code], check=False).returncode)


def _fork_bomb() -> float:
    """Ends by itself after a number of forks that proves that the limit failed, to protect the machine."""
    count = mmap.mmap(-1, 8)
    while (forks := int.from_bytes(count[:8], "little")) < MOST_FORKS:
        count[:8] = (forks + 1).to_bytes(8, "little")
        os.fork()
    time.sleep(600)
    return 1.0


def _scattering_fork_bomb() -> float:
    """2 to the power of DOUBLINGS processes, each in its own group and session, which end by themselves."""
    for _ in range(DOUBLINGS):
        if os.fork() == 0:
            os.setsid()
    time.sleep(30)
    os._exit(0)


def _moving() -> float:
    """Few processes at a time; each lives only until it has started the next."""
    for _ in range(4):
        if os.fork() == 0:
            until = time.monotonic() + LIFETIME_S
            while time.monotonic() < until:
                if os.fork():
                    os._exit(0)
                os.setsid()
            os._exit(0)
    return 1.0


def _same_process() -> float:
    """1 if /proc and system calls give the same id for this process."""
    return float(int(os.readlink("/proc/self")) == os.getpid())


def _forked_copy() -> float:
    os.fork()
    return 1.0


def _leave_processes() -> float:
    for _ in range(100):
        subprocess.Popen(["sleep", "3600"], start_new_session=True)
    return 1.0


def _leave_one() -> float:
    subprocess.Popen(["sleep", "3602"], start_new_session=True)
    return 1.0


def _die_later() -> float:
    threading.Timer(0.05, os._exit, [3]).start()
    return 1.0


def _leave_one_and_die() -> float:
    subprocess.Popen(["sleep", "3601"], start_new_session=True)
    os._exit(0)


def _print() -> float:
    print('[1.0, {"act": 99.0}]')  # noqa: T201
    os.write(1, b"noise without an end")
    return 1.0


def _close_everything() -> float:
    os.closerange(0, 1000)
    return 1.0


def _write_everywhere() -> float:
    for descriptor in range(3, 64):
        try:
            os.write(descriptor, b"noise\n")
        except OSError:
            continue
    return 1.0


ACTS: Mapping[str, Callable[[], Any]] = {
    "exit": sys.exit,
    "exit 0": raising(SystemExit(0)),
    "interrupt": raising(KeyboardInterrupt()),
    "generator exit": raising(GeneratorExit()),
    "unshowable": raising(Unshowable()),
    "long": raising(ValueError("x" * 10_000_000)),
    "recursion": _recurse,
    "os exit": lambda: os._exit(0),
    "abort": os.abort,
    "segfault": lambda: ctypes.string_at(8),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "kill group": lambda: os.killpg(0, signal.SIGKILL),
    "kill keeper": lambda: os.kill(os.getppid(), signal.SIGKILL),
    "die later": _die_later,
    "nap": lambda: time.sleep(0.3) or 0.5,
    "sleep": lambda: time.sleep(3600),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "loop": lambda: [None for _ in iter(int, 1)],
    "GIL": lambda: ctypes.PyDLL(None).sleep(3600),
    "regex": lambda: re.match(r"(a+)+$", "a" * 60 + "b"),
    "allocate": _allocate,
    "allocate in a child": _allocate_in_a_child,
    "fork bomb": _fork_bomb,
    "scattering fork bomb": _scattering_fork_bomb,
    "moving": _moving,
    "same process": _same_process,
    "forked copy": _forked_copy,
    "leave processes": _leave_processes,
    "leave one": _leave_one,
    "leave one and die": _leave_one_and_die,
    "print": _print,
    "close": _close_everything,
    "write": _write_everywhere,
    "400 digits": lambda: 10**400,
    "5000 digits": lambda: 10**5000,
    "minus 400 digits": lambda: -(10**400),
    "inf": lambda: float("inf"),
    "decimal": lambda: Decimal("0.5"),
    "decimal nan": lambda: Decimal("sNaN"),
    "decimal 1e400": lambda: Decimal("1e400"),
    "fraction": lambda: fractions.Fraction(1, 4),
    "fraction of 400 digits": lambda: fractions.Fraction(10**400),
    "complex": lambda: 1j,
    "true": lambda: True,
    "minus zero": lambda: -0.0,
    "part of 400 digits": lambda: {"a": 1, "b": 10**400},
    "nested": lambda: {"a": {"b": 1}},
    "equal names": lambda: {1: 1.0, "1": 2.0},
    "many parts": lambda: {str(part): 1.0 for part in range(1_000_000)},
    "lying parts": lambda: Lying(a=1.0),
    "sum too large": lambda: {"a": 1e308, "b": 1e308},
}


def act(prompt: str, response: str, meta: Mapping[str, Any]) -> Any:
    return ACTS[response]() if response in ACTS else float(response)


def length(prompt: str, response: str, meta: Mapping[str, Any]) -> float:
    return float(len(response))


def exits(prompt: str, response: str, meta: Mapping[str, Any]) -> float:
    raise SystemExit(0)


def hangs(prompt: str, response: str, meta: Mapping[str, Any]) -> float:
    time.sleep(3600)
    return 1.0


def sometimes_exits(prompt: str, response: str, meta: Mapping[str, Any]) -> float:
    if prompt.endswith("3."):
        os._exit(0)
    return 1.0
