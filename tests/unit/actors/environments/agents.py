"""Agents that do what the prompt's `does` says. The contained process imports this module."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from actors.environments.contract import Task

WEATHER = {"type": "function", "function": {"name": "weather", "description": "", "parameters": {"type": "object"}}}


def post(base_url: str, **body: Any) -> dict[str, Any]:
    """The response, or that of an error."""
    data = json.dumps({"model": "policy", **body}).encode()
    request = urllib.request.Request(f"{base_url}/chat/completions", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as response:
            found: dict[str, Any] = json.load(response)
    except urllib.error.HTTPError as error:
        return {"status": error.code, **json.load(error)}
    return found


def said(base_url: str, messages: list[dict[str, Any]], **body: Any) -> str:
    """Appends the policy's message, and returns its text."""
    message = post(base_url, messages=messages, **body)["choices"][0]["message"]
    messages.append(message)
    return str(message["content"])


def asks(prompt: Task, base_url: str, turns: int = 3) -> dict[str, float]:
    """Talks for some turns, and rewards the last one's length."""
    messages = [{"role": "user", "content": prompt.text}]
    for turn in range(turns):
        text = said(base_url, messages)
        messages.append({"role": "user", "content": f"{turn}: {len(text)}"})
    return {"length": float(len(text)), "turns": float(turns)}


async def waits(prompt: Task, base_url: str) -> float:
    """A coroutine."""
    return float(len(await asyncio.to_thread(said, base_url, [{"role": "user", "content": prompt.text}])))


def uses_a_tool(prompt: Task, base_url: str) -> float:
    messages: list[dict[str, Any]] = [{"role": "user", "content": prompt.text}]
    while True:
        answer = post(base_url, messages=messages, tools=[WEATHER])["choices"][0]
        messages.append(answer["message"])
        if answer["finish_reason"] != "tool_calls":
            return 1.0
        for call in answer["message"]["tool_calls"]:
            place = json.loads(call["function"]["arguments"])["place"]
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": f"rain in {place}"})


def rewrites(prompt: Task, base_url: str) -> float:
    """Shortens what was said, and then asks two things about the same history."""
    said(base_url, [{"role": "user", "content": prompt.text}])
    short = [{"role": "user", "content": prompt.text}, {"role": "assistant", "content": "short"}]
    again = [*short, {"role": "user", "content": "and?"}]
    other = [*short, {"role": "user", "content": "or?"}]
    said(base_url, again)
    said(base_url, other)
    said(base_url, [*again, {"role": "user", "content": "so?"}])
    return 1.0


def limited(prompt: Task, base_url: str) -> float:
    """Asks for three tokens."""
    answer = post(base_url, messages=[{"role": "user", "content": prompt.text}], max_tokens=3)
    assert answer["usage"]["completion_tokens"] == 3 and answer["choices"][0]["finish_reason"] == "length"
    return 1.0


def never_stops(prompt: Task, base_url: str) -> float:
    """Calls until the endpoint refuses, and raises then."""
    messages = [{"role": "user", "content": prompt.text}]
    while True:
        said(base_url, messages)
        messages.append({"role": "user", "content": "more"})


def knows_when_to_stop(prompt: Task, base_url: str) -> dict[str, float]:
    """Calls until the endpoint refuses, and returns a reward then."""
    messages = [{"role": "user", "content": prompt.text}]
    while "choices" in (answer := post(base_url, messages=messages)):
        messages += [answer["choices"][0]["message"], {"role": "user", "content": "more"}]
    return {answer["error"]["code"]: 1.0}


def insists(prompt: Task, base_url: str) -> float:
    """Goes on after refusals."""
    while True:
        post(base_url, messages=[{"role": "user", "content": "x " * 5000}])


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hostile(prompt: Task, base_url: str) -> Any:
    """Does what the prompt says; a prompt that says nothing gets an agent that works."""
    does = prompt.meta.get("does")
    ways: dict[str, Callable[[], Any]] = {
        "never call": lambda: 1.0,
        "raise": lambda: base_url.split()[1],
        "exit": lambda: os._exit(3),
        "kill": _kill,
        "freeze": lambda: time.sleep(600),
        "backtrack": lambda: re.match("(a+)+$", "a" * 64 + "b"),  # holds the interpreter's lock
        "text": lambda: "good",
        "nan": lambda: float("nan"),
        "nothing": lambda: None,
    }
    when, _, what = (does or "").partition(" ")
    if when == "first":
        return ways[what]()
    messages = [{"role": "user", "content": prompt.text}]
    said(base_url, messages)
    if when == "then":
        return ways[what]()
    messages.append({"role": "user", "content": "Go on."})
    said(base_url, messages)
    return 0.5


def returns_early(prompt: Task, base_url: str) -> float:
    """Returns after a call, and calls again later, from a thread that it has left behind."""
    message = [{"role": "user", "content": prompt.text}]
    said(base_url, message)

    def later() -> None:
        time.sleep(0.3)
        found = post(base_url, messages=message[:1])
        assert found["error"]["code"] == "episode_over", found

    threading.Thread(target=later).start()
    return 1.0


def bad_calls(prompt: Task, base_url: str) -> dict[str, float]:
    """The code of every refused call as a reward part; then a good call."""
    good = {"messages": [{"role": "user", "content": prompt.text}]}
    calls: list[dict[str, Any]] = [
        {**good, "model": "gpt-4"},
        {**good, "n": 2},
        {**good, "stop": ["\n"]},
        {**good, "logprobs": True},
        {**good, "max_tokens": 0},
        {**good, "stream": True, "stream_options": ["include_usage"]},
        {**good, "tools": [{"name": "no function"}]},
        {"messages": []},
        {"messages": "hi"},
        {"messages": [{"role": "robot", "content": "hi"}]},
        {"messages": [*good["messages"], {"role": "assistant", "content": "I"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"role": "user", "content": "\ud800"}]},
        {"messages": [{"role": "user", "content": "x" * 1_100_000}]},
    ]
    found: dict[str, float] = {}
    for call in calls:
        answer = post(base_url, **call)
        assert answer["status"] in (400, 404) and answer["error"]["message"], answer
        found[answer["error"]["code"]] = found.get(answer["error"]["code"], 0.0) + 1.0
    assert "choices" in post(base_url, **good)
    return found


def needs_level(prompt: Task, base_url: str, level: int) -> float:
    return float(level)
