"""Tasks of the package `verifiers` (extra `verifiers`), played by their own harness, an agent: `play`.

The harness calls the policy as it would call any endpoint, so its prompts, tools and rewards are those of an evaluation
with `verifiers` itself.

A prompt names its task: `task` is the task's number in the taskset. `write_prompts` makes such a file.
"""

from __future__ import annotations

import asyncio
import importlib
import json
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from actors.environments.calls import MODEL
from actors.environments.contract import Task

_WAY_OUT = "install it on every node: pip install 'rlhf-orchestrator[verifiers]'"
_SUBPROCESS = {"runtime": {"type": "subprocess"}}

_environments: dict[str, asyncio.Future[tuple[Any, list[Any]]]] = {}
_serving = AsyncExitStack()


async def play(prompt: Task, base_url: str, env: Mapping[str, Any]) -> dict[str, float]:
    """One episode of the task that the prompt names. Returns its rewards by name, each times its weight.

    Args:
        env: the block `env` of a configuration of verifiers, such as {taskset: {id: gsm8k-v1}}. The harness runs in a
            subprocess unless it says otherwise.

    Raises:
        LookupError: the prompt names no task.
        RuntimeError: the episode failed; the text is the last error of verifiers.
    """
    environment, tasks = await _served(env)
    number = prompt.meta.get("task")
    if not isinstance(number, int) or not 0 <= number < len(tasks):
        raise LookupError(f"the prompt's field `task` is {number!r}; the taskset has {len(tasks)} tasks, from 0 on")
    v1 = _verifiers()
    context = v1.ModelContext(model=MODEL, client=v1.EvalClientConfig(base_url=base_url, api_key_var="OPENAI_API_KEY"))
    episode = await environment.run_episode(tasks[number], context)
    rewards = [item for trace in episode.traces for item in trace.rewards.items()]
    if not episode.ok or not rewards or any(reward is None for _, reward in rewards):
        errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
        raise RuntimeError(f"{errors[-1].type}: {errors[-1].message}" if errors else "the task has given no reward")
    found: dict[str, float] = {}
    for name, reward in rewards:  # of several agents, if the environment has them
        found[name] = found.get(name, 0.0) + reward.value
    return found


def write_prompts(env: Mapping[str, Any], file: Path) -> int:
    """Writes a prompts file for all tasks of a taskset. Returns their number."""
    lines = []
    for number, task in enumerate(_made(env).taskset):
        text = task.data.prompt if isinstance(task.data.prompt, str) else task.data.name or f"task {number}"
        lines.append(json.dumps({"prompt": text, "task": number}, ensure_ascii=False))
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return len(lines)


async def _served(env: Mapping[str, Any]) -> tuple[Any, list[Any]]:
    """The environment, which serves until the process ends, and its tasks: made once in a process."""
    key = json.dumps(env, sort_keys=True)
    if key not in _environments:
        made: asyncio.Future[tuple[Any, list[Any]]] = asyncio.get_running_loop().create_future()
        _environments[key] = made
        try:
            environment = _made(env)
            tasks = list(environment.taskset)
            await _serving.enter_async_context(environment.serving())
        except BaseException as error:
            del _environments[key]
            made.set_exception(error)
            made.exception()  # read: it is raised here, too
            raise
        made.set_result((environment, tasks))
    return await asyncio.shield(_environments[key])


def _made(env: Mapping[str, Any]) -> Any:
    _verifiers()
    loaders = importlib.import_module("verifiers.v1.utils.loaders")
    agents = {"agent": {**_SUBPROCESS, **env.get("agent", {})}} if "id" not in env else {}
    return loaders.load_environment(loaders.resolve_env_config({**env, **agents}))


def _verifiers() -> Any:
    try:
        return importlib.import_module("verifiers.v1")
    except ImportError as error:
        raise ImportError(f"the package verifiers can't be imported ({error}); {_WAY_OUT}") from None
