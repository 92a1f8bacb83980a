"""Runs agents and serves them the policy, in the contained process: one endpoint on loopback, one path per episode.

    agent(prompt, base_url)        the user's function: a thread, or a task if it is a coroutine
        POST base_url/chat/completions   waits until the policy has spoken
    reset(prompt)                  starts the agent, and waits for its first call or its end
    step(reply)                    answers that call, and waits for the next one or the end

So an agent is an environment whose observations are calls. It makes one call at a time: the calls of all episodes are
answered together, in the order of the rows, whenever each episode has made one.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import secrets
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from aiohttp import web

from actors.environments.calls import MODEL, RefusedCallError, call_of, completion, error, parsed, streamed
from actors.environments.contract import Task

if TYPE_CHECKING:
    from actors.rewards.rule_process import Channel

_LOOPBACK = "127.0.0.1"
_LONGEST_REQUEST = 1 << 21  # bytes
_LONGEST_CALL = 1_000_000  # characters of JSON: what one answer of the contained process holds
_STACK_BYTES = 1 << 21  # counted by rule_limits.memory_gib, for every thread
_UNWIND_S = 0.5
_END = "the episode is over"


class Agent:
    """One episode of an agent.

    Args:
        run: prompt -> what the agent returns; a coroutine or not.
    """

    def __init__(self, run: Callable[[Task], Any], channel: Channel, *, is_async: bool) -> None:
        self._run, self._channel, self._is_async = run, channel, is_async
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Mapping[str, Any]] = asyncio.Queue()
        self._open: asyncio.Future[Mapping[str, Any]] | None = None
        self._task: asyncio.Task[None] | None = None
        self._thread: threading.Thread | None = None
        self._is_over = False
        self.num_calls = 0

    async def reset(self, prompt: Task) -> Mapping[str, Any]:
        if self._is_async:
            self._task = asyncio.create_task(self._finish(prompt))
        else:
            self._thread = threading.Thread(target=self._work, args=(prompt,), daemon=True)
            self._thread.start()
        return await self._events.get()

    async def step(self, told: Mapping[str, Any]) -> Mapping[str, Any]:
        if self._open is not None and not self._open.done():
            self._open.set_result(told)
        return await self._events.get()

    async def called(self, body: Any) -> dict[str, Any]:
        """The response to a request of the agent.

        Raises:
            RefusedCallError
        """
        if self._is_over:
            raise RefusedCallError("episode_over", _END)
        if self._open is not None:
            raise RefusedCallError("call_in_progress", "another call of this episode is open: make one after the other")
        call = call_of(body)
        if len(json.dumps(call)) > _LONGEST_CALL:
            raise RefusedCallError("context_length_exceeded", f"the call is longer than {_LONGEST_CALL} characters")
        self.num_calls += 1
        self._open = self._loop.create_future()
        self._events.put_nowait({"call": call})
        try:
            told = await self._open
        finally:
            self._open = None
        if "refused" in told:
            raise RefusedCallError(told["refused"]["code"], told["refused"]["message"])
        return completion(told, self.num_calls)

    def abandon(self) -> None:
        """Ends the episode: calls are refused from now on, and a coroutine is cancelled."""
        self._is_over = True
        if self._open is not None and not self._open.done():
            self._open.set_result({"refused": {"code": "episode_over", "message": _END}})
        if self._task is not None:
            self._task.cancel()

    def is_running(self) -> bool:
        return any(
            (self._task is not None and not self._task.done(), self._thread is not None and self._thread.is_alive())
        )

    def _work(self, prompt: Task) -> None:
        try:
            found = self._ended(self._run(prompt))
        except BaseException as problem:  # noqa: BLE001  the user's code may raise anything, SystemExit too
            found = self._raised(problem)
        with suppress(RuntimeError):  # the loop is closed: nobody waits for the end of this episode any more
            self._loop.call_soon_threadsafe(self._end, found)

    async def _finish(self, prompt: Task) -> None:
        try:
            found = self._ended(await self._run(prompt))
        except asyncio.CancelledError:
            if self._is_over:
                raise
            found = self._raised(asyncio.CancelledError("it cancelled itself"))
        except BaseException as problem:  # noqa: BLE001  the user's code may raise anything, SystemExit too
            found = self._raised(problem)
        self._end(found)

    def _end(self, found: Mapping[str, Any]) -> None:
        self._is_over = True
        self._events.put_nowait(found)

    def _raised(self, problem: BaseException) -> Mapping[str, Any]:
        return {"call": None, "raised": f"raised {self._channel.described(problem)}"}

    def _ended(self, result: Any) -> Mapping[str, Any]:
        parts, problem = self._channel.numbers("environment", result)
        if problem:
            return {"call": None, "raised": f"returned no reward: it {problem}"}
        return {"call": None, "raised": None, "parts": parts, "reward": sum(parts.values()), "info": {}}


class Endpoint:
    """Serves the agents of a process. `made` makes one for an episode, which it serves from then on.

    Args:
        agent: the user's function.
        options: its keyword arguments.
    """

    def __init__(self, agent: Callable[..., Any], options: Mapping[str, Any], channel: Channel) -> None:
        self._agent, self._options, self._channel = agent, options, channel
        self._is_async = inspect.iscoroutinefunction(agent)
        self._path = secrets.token_hex(8)  # other users of the machine can't call what they can't name
        self._served: dict[str, Agent] = {}
        self._count, self._port = 0, 0
        os.environ.setdefault("OPENAI_API_KEY", "none")
        for name in ("NO_PROXY", "no_proxy"):
            os.environ[name] = ",".join(filter(None, [os.environ.get(name), _LOOPBACK]))
        threading.stack_size(_STACK_BYTES)

    async def open(self) -> None:
        app = web.Application(client_max_size=_LONGEST_REQUEST)
        app.router.add_post(f"/{self._path}/{{episode}}/v1/chat/completions", self._completions)
        app.router.add_get(f"/{self._path}/{{episode}}/v1/models", self._models)
        app.router.add_route("*", "/{rest:.*}", self._unknown)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, _LOOPBACK, 0)
        await site.start()
        self._port = runner.addresses[0][1]

    def made(self) -> Agent:
        name = str(self._count)
        self._count += 1
        base_url = f"http://{_LOOPBACK}:{self._port}/{self._path}/{name}/v1"
        agent = Agent(
            lambda prompt: self._agent(prompt, base_url, **self._options), self._channel, is_async=self._is_async
        )
        self._served[name] = agent
        return agent

    async def clear(self) -> int:
        """Ends all episodes. Returns how many agents still run."""
        for agent in self._served.values():
            agent.abandon()
        until = asyncio.get_running_loop().time() + _UNWIND_S
        while any(agent.is_running() for agent in self._served.values()):
            if asyncio.get_running_loop().time() > until:
                break
            await asyncio.sleep(0.01)
        running = sum(agent.is_running() for agent in self._served.values())
        self._served.clear()
        return running

    async def _completions(self, request: web.Request) -> web.Response:
        agent = self._served.get(request.match_info["episode"])
        try:
            if agent is None:
                raise RefusedCallError("episode_over", _END)
            body = _json(await request.read())
            whole = await agent.called(body)
            if not body.get("stream"):
                return web.json_response(whole)
            with_usage = bool((body.get("stream_options") or {}).get("include_usage"))
            return web.Response(text=streamed(whole, with_usage=with_usage), content_type="text/event-stream")
        except RefusedCallError as problem:
            status = 404 if problem.code == "model_not_found" else 400
            return web.json_response(error(problem.code, str(problem), problem.parameter), status=status)

    async def _models(self, _: web.Request) -> web.Response:
        model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "rlhf"}
        return web.json_response({"object": "list", "data": [model]})

    async def _unknown(self, request: web.Request) -> web.Response:
        text = f"{request.method} {request.path} is not served; base_url serves /chat/completions and /models"
        return web.json_response(error("not_found", text), status=404)


def _json(data: bytes) -> Any:
    try:
        return parsed(data)
    except ValueError as problem:
        raise RefusedCallError("invalid_request", f"the request is no JSON: {problem}") from None
