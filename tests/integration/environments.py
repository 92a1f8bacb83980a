"""Environments for policies that write at random. The contained process imports this module."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from openai import OpenAI

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


def asking(prompt: Task, base_url: str, how: str = "") -> dict[str, float]:
    """An agent: talks for two turns, writes its own version of the history, and asks once more. With `how`, it fails on
    prompts with an odd number."""
    client = OpenAI(base_url=base_url)
    messages: list[Any] = [{"role": "user", "content": prompt.text}]
    texts: list[str] = []

    def ask() -> None:
        answer = client.chat.completions.create(model="policy", messages=messages)
        texts.append(answer.choices[0].message.content or "")
        messages.append({"role": "assistant", "content": texts[-1]})

    ask()
    if how and prompt.meta["number"] % 2:
        fails(how)
    messages.append({"role": "user", "content": f"You wrote {len(texts[0])} characters."})
    ask()
    messages[:] = [{"role": "user", "content": f"{prompt.text} So far: {len(texts[0] + texts[1])}"}]
    ask()
    return {"length": len("".join(texts)) / 100, "answer": float("a" in texts[-1])}


def fails(how: str) -> None:
    if how == "raise":
        raise ValueError("no such move")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


class FailsOnSome:
    """Fails on prompts with an odd number."""

    def __init__(self, how: str) -> None:
        self._how = how

    def reset(self, prompt: Task) -> None:
        self._fails = prompt.meta["number"] % 2 == 1

    def step(self, action: str) -> Any:
        if self._fails:
            fails(self._how)
        return "", len(action) / 100, True, {}
