"""What environments and agents are. Needs only the standard library: the contained process imports it.

An environment is a class; `environment.name` names it by `package.module:Class`. One object plays one episode:

    class Guess:
        def __init__(self, highest: int = 9) -> None: ...            # environment.options
        def reset(self, prompt: Task) -> str | None: ...             # the first observation
        def step(self, action: str) -> tuple[str, float, bool, dict]: ...

Both may be coroutines; then the calls of a turn run at the same time.

An agent is a function, or a coroutine, that plays a whole episode: `agent(prompt: Task, base_url: str, **options)`, the
options being environment.options. It calls the policy at `base_url` as an OpenAI-compatible endpoint, one call at a
time, and returns the reward: a number, or named parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Task:
    """What an episode is about.

    Args:
        text: the prompt's last user message.
        meta: the other fields of the prompt's record (`answer`, ...), and its `messages`.
        seed: derived from the run's seed and the prompt: all samples of a prompt have the same one, so that they are
            compared on the same episode.
    """

    text: str
    meta: Mapping[str, Any]
    seed: int


Step = tuple[str, float | Mapping[str, float], bool, Mapping[str, Any]]
"""Observation, reward of this step (or named parts of it, which are summed), whether the episode is over, and anything
else that is worth keeping in the log. The observation of the last step is not shown to the policy."""


class Environment(Protocol):
    """One episode.

    A run is reproducible if the answers depend only on the task and on the actions. If the process of an environment
    ends, its other episodes are played again from their actions; one that then answers differently fails.
    """

    def reset(self, prompt: Task) -> str | None:
        """The text that replaces the prompt's last user message. None: the prompt stays as it is."""

    def step(self, action: str) -> Step:
        """The answer to a turn of the policy: its text, without the tokens that end it."""
