"""Environments for policies that write at random. The contained process imports this module."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from actors.environments.calculator import Calculator
from actors.environments.contract import Step, Task


class Counting(Calculator):
    """Calculates with the length of each action, and takes the third as the answer."""

    def reset(self, prompt: Task) -> None:
        super().reset(prompt)
        self._turn = 0

    def step(self, action: str) -> Step:
        self._turn += 1
        if self._turn < 3:
            observation, _, done, info = super().step(f"<calc>{len(action)} + 1</calc>")
            return observation, len(action) / 100, done, info
        return "", {"answer": float("a" in action)}, True, {}


class FailsOnSome:
    """Fails on prompts with an odd number."""

    def __init__(self, how: str) -> None:
        self._how = how

    def reset(self, prompt: Task) -> None:
        self._fails = prompt.meta["number"] % 2 == 1

    def step(self, action: str) -> Any:
        if self._fails and self._how == "raise":
            raise ValueError("no such move")
        if self._fails and self._how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._fails:
            time.sleep(600)
        return "", len(action) / 100, True, {}
