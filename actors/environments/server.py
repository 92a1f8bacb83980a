"""Calls environments, in the contained process. Needs only the standard library, without agents.

Requests: {"calls": [(kind, episode, argument)], "at_once": bool} with kind "reset" (argument: a Task) or "step"
(argument: the action), or {"forget": True}, which is answered with the number of agents that still run. Answers, one
per call and in order: a text that says why the call failed, or

    of an environment   {"observation", "reward", "parts", "done", "info"}
    of an agent         {"call": messages, tools and max_tokens}, or at its end {"call": None, "raised": why, or None:
                        then also "reward", "parts", "done", "info"}
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actors.environments.agents import Endpoint
    from actors.rewards.rule_process import Channel

Action = str | Mapping[str, Any]
"""The text of a turn; for agents what actors.environments.calls.reply or refusal returns."""
Call = tuple[str, int, Any]
"""("reset", episode, Task) or ("step", episode, action)."""
Answer = Mapping[str, Any] | str
"""A text is a failure."""

LONGEST_OBSERVATION = 1 << 17  # characters
_LONGEST_INFO = 1 << 14
_METHODS = ("reset", "step")
_SHARE_OF_LIMIT = 0.8  # so that a coroutine that waits too long fails before its process is ended


def serve(hello: Mapping[str, Any], channel: Channel) -> None:
    made = channel.load(hello["environment"], "a class with the methods reset and step, or a function")
    options = hello["options"]
    is_agent = not isinstance(made, str) and not inspect.isclass(made)
    problem = made if isinstance(made, str) else (_no_agent if is_agent else _problem)(made, options, channel)
    if isinstance(made, str) or problem:
        channel.answer({"problem": f"{hello['environment']!r}: {problem}"})
        return
    is_async = is_agent or any(inspect.iscoroutinefunction(getattr(made, name)) for name in _METHODS)
    host = _Host(lambda: made(**options), channel, hello["step_s"] * _SHARE_OF_LIMIT)
    if is_agent:
        host.serve_agents(made, options)
    channel.answer({"problem": None, "is_async": is_async, "is_agent": is_agent})
    while True:
        request = channel.read()
        if request.get("forget"):
            channel.answer(host.forget())
        else:
            host.answer(request["calls"], at_once=request.get("at_once", False))


def _no_agent(made: Callable[..., Any], options: Mapping[str, Any], channel: Channel) -> str | None:
    try:
        inspect.signature(made).bind(None, "", **options)
    except (TypeError, ValueError) as error:
        return f"it can't be called as agent(prompt, base_url, **environment.options): {channel.described(error)}"
    return None


def _problem(made: Callable[..., Any], options: Mapping[str, Any], channel: Channel) -> str | None:
    missing = [name for name in _METHODS if not callable(getattr(made, name, None))]
    if missing:
        return f"it has no method {missing[0]}; see actors/environments/contract.py."
    try:
        made(**options)
    except BaseException as error:  # noqa: BLE001  the user's code may raise anything
        return f"it can't be made with environment.options={dict(options)}: {channel.described(error)}"
    return None


class _Host:
    """The episodes of one shard, by number.

    Args:
        wait_s: time limit of a coroutine.
    """

    def __init__(self, make: Callable[[], Any], channel: Channel, wait_s: float) -> None:
        self._make, self._channel, self._wait_s = make, channel, wait_s
        self._loop = asyncio.new_event_loop()
        self._endpoint: Endpoint | None = None
        self._episodes: dict[int, Any] = {}

    def serve_agents(self, agent: Callable[..., Any], options: Mapping[str, Any]) -> None:
        agents = importlib.import_module("actors.environments.agents")  # its web server takes time to import
        endpoint = agents.Endpoint(agent, options, self._channel)
        self._loop.run_until_complete(endpoint.open())
        self._endpoint, self._make = endpoint, endpoint.made

    def forget(self) -> int:
        """Ends all episodes. Returns how many agents still run."""
        self._episodes.clear()
        return 0 if self._endpoint is None else self._loop.run_until_complete(self._endpoint.clear())

    def answer(self, calls: Sequence[Call], *, at_once: bool) -> None:
        if at_once:
            self._loop.run_until_complete(self._answer_together(calls))
            return
        for place, call in enumerate(calls):
            self._channel.at(place)
            self._channel.answer(self._loop.run_until_complete(self._answered(call)))

    async def _answer_together(self, calls: Sequence[Call]) -> None:
        tasks = [asyncio.ensure_future(self._answered(call)) for call in calls]
        for place, task in enumerate(tasks):
            self._channel.at(place)
            self._channel.answer(await task)

    async def _answered(self, call: Call) -> Answer:
        kind, episode, argument = call
        limit = asyncio.timeout(self._wait_s)
        try:
            if kind == "reset":
                self._episodes[episode] = self._make()
            result = getattr(self._episodes[episode], kind)(argument)
            if inspect.isawaitable(result):
                async with limit:
                    result = await result
            if self._endpoint is not None:
                answer: Answer = result
                return answer
            return _first(result) if kind == "reset" else self._stepped(result)
        except BaseException as error:  # noqa: BLE001  the user's code may raise anything, SystemExit too
            if not limit.expired():
                return self._channel.described(error)
            if self._endpoint is None:
                return f"gave no answer within {self._wait_s:g} s"
            self._episodes[episode].abandon()
            return f"neither made a call nor returned within {self._wait_s:g} s (0.8 of environment.step_s)"

    def _stepped(self, result: Any) -> Answer:
        if not isinstance(result, tuple) or len(result) != 4:
            return f"returned {_shown(result)}, not (observation, reward, done, info)"
        observation, reward, done, info = result
        parts, problem = self._channel.numbers("environment", reward)
        if problem:
            return f"reward: {problem}"
        if not isinstance(done, bool):
            return f"returned done={_shown(done)}, not true or false"
        if observation is None and done:
            observation = ""
        shown = _first(observation)
        if isinstance(shown, str):
            return shown
        if shown["observation"] is None:
            return "returned no observation, and the episode is not over"
        return {**shown, "reward": sum(parts.values()), "parts": parts, "done": done, "info": _storable(info)}


def _first(observation: Any) -> Answer:
    if observation is not None and not isinstance(observation, str):
        return f"returned the observation {_shown(observation)}, not text"
    if observation is not None and len(observation) > LONGEST_OBSERVATION:
        return f"returned an observation of {len(observation)} characters; the limit is {LONGEST_OBSERVATION}"
    try:
        (observation or "").encode()
    except UnicodeEncodeError:
        return "returned an observation with lone surrogates, which are not text"
    return {"observation": observation}


def _storable(info: Any) -> Any:
    """`info` as JSON; what is no JSON, or too long, as shortened text."""
    try:
        text = json.dumps(info, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return _shown(info)
    return info if len(text) <= _LONGEST_INFO else text[:_LONGEST_INFO]


def _shown(value: object) -> str:
    try:
        return repr(value)[:200]
    except BaseException:  # noqa: BLE001  repr() of the user's class may raise anything
        return f"a {type(value).__name__}"
