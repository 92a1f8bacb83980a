"""Environments that do what the policy says. The contained process imports this module."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from actors.environments.contract import Task


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _raise() -> None:
    raise ValueError("no such move")


def _spin() -> None:
    while True:
        pass


ACTS: dict[str, Callable[[], Any]] = {
    "raise": _raise,
    "exit": lambda: sys.exit(3),
    "kill": _kill,
    "freeze": lambda: time.sleep(600),
    "spin": _spin,
    "memory": lambda: bytearray(1 << 33),
}


class Obedient:
    """Answers "<number of steps so far> <seed>" and obeys its actions."""

    def __init__(self, folder: str | None = None) -> None:
        self._folder = folder
        self._count, self._seed = 0, 0

    def reset(self, prompt: Task) -> str | None:
        self._count, self._seed = 0, prompt.seed
        if prompt.meta.get("reset") is not None:
            return self._act(prompt.meta["reset"])
        return None

    def step(self, action: str) -> Any:
        self._count += 1
        found = self._act(action)
        if isinstance(found, tuple):
            return found
        return f"{self._count} {self._seed}", 0.5, action == "end", {"action": action}

    def _act(self, action: str) -> Any:
        if action == "once" and self._folder is not None:
            mark = Path(self._folder) / "once"
            if not mark.exists():
                mark.touch()
                _kill()
        return ACTS[action]() if action in ACTS else RUBBISH.get(action, action)


class Fickle(Obedient):
    """Answers at random, so an episode can't be played again."""

    def step(self, action: str) -> Any:
        self._act(action)
        return os.urandom(8).hex(), 0.0, False, {}


class Waiting:
    """Its coroutines wait."""

    async def reset(self, prompt: Task) -> None:
        await asyncio.sleep(0)

    async def step(self, action: str) -> Any:
        if action in ACTS:
            ACTS[action]()
        await asyncio.sleep(600 if action == "wait" else 0.3)
        return action, 1.0, False, {}


class NeedsMore:
    def __init__(self, level: int) -> None:
        self.level = level

    def reset(self, prompt: Task) -> None: ...

    def step(self, action: str) -> Any: ...


class NoStep:
    def reset(self, prompt: Task) -> None: ...


RUBBISH: dict[str, Any] = {
    "nothing": (None,),
    "three": ("a", 1.0, True),
    "bytes": (b"a", 1.0, False, {}),
    "number": (7, 1.0, False, {}),
    "silent": (None, 1.0, False, {}),
    "nan": ("a", float("nan"), False, {}),
    "no reward": ("a", None, False, {}),
    "text reward": ("a", "1", False, {}),
    "done": ("a", 1.0, "yes", {}),
    "long": ("a" * (1 << 18), 1.0, False, {}),
    "surrogate": ("\ud800", 1.0, False, {}),
    "object": ("a", 1.0, False, {"info": object()}),
    "parts": ("a", {"x": 1, "y": 0.25}, False, {}),
}
