"""What the policy talks to in several turns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from orchestrator.config.base import Positive, Seconds, Section
from orchestrator.config.rewards import EnvironmentRewardConfig, RewardConfig, WeightedEnvironment


class EnvironmentConfig(Section):
    """Conversations of several turns, in the stages sample, rl and evaluate (docs/environments.md)."""

    name: str | None = Field(None, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """Class of the environment, `package.module:Class`, or function of an agent that calls the policy as an
    OpenAI-compatible endpoint, `package.module:function`. Null: a sample is one reply. Otherwise rollout.max_new_tokens
    limits a turn, and model.max_length the whole conversation."""
    options: Mapping[str, Any] = {}
    """Keyword arguments of the class or function."""
    max_turns: Positive = 4
    """Most turns of the policy. An episode that is not over then is cut, as one that fills model.max_length."""
    step_s: Seconds = 30.0
    """Time limit of one call, or of an agent between two calls. A call that exceeds it is killed and its sample fails.
    Memory and processes: see rule_limits."""
    role: Literal["user", "tool"] = "user"
    """Role of the environment's turns in the chat template."""

    def turns(self) -> int:
        """Most turns of one sample."""
        return self.max_turns if self.name is not None else 1

    def longest(self, turn: int, window: int) -> int:
        """The most tokens that a sample may have.

        Args:
            turn: most tokens of one turn.
            window: most tokens beside the prompt.
        """
        return turn if self.name is None else max(turn, min(turn * self.max_turns, window))

    def contradictions(self, reward: RewardConfig) -> Iterator[str]:
        of_episodes = (EnvironmentRewardConfig, WeightedEnvironment)
        key = next((key for key, each in reward.sources_by_key().items() if isinstance(each, of_episodes)), None)
        if key is not None and self.name is None:
            yield (
                f"{key}.name='environment' needs an environment, and environment.name is null: name one, such as "
                "actors.environments.calculator:Calculator, or choose another reward."
            )
