"""Rewards from an HTTP endpoint.

POST {"samples": [{"prompt": text, "response": text, "meta": object}, ...]}
->   {"rewards": [number or null, ...]}     one per sample, in order; null: the sample could not be scored
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from time import monotonic
from typing import Any

import pyarrow as pa

from actors.rewards import RewardContext, Score, samples
from actors.rewards.endpoint import ANSWER_BYTES, FIRST_PAUSE_S, Endpoint
from actors.rewards.rule_process import finite_number
from orchestrator.config.rewards import HttpSource
from orchestrator.errors import RewardError

_SAMPLE_BYTES = 1 << 10


class HttpReward:
    """Args:
        total_s: time limit of all tries and pauses for one table.
        first_pause_s: pause before the second try.

    Raises:
        ConfigError: the URL is not an http address, or `token_from` yields no token.
    """

    def __init__(self, reward: HttpSource, *, total_s: float = 480.0, first_pause_s: float = FIRST_PAUSE_S) -> None:
        self._endpoint = Endpoint(reward, first_pause_s=first_pause_s)
        self._total_s = total_s

    def scores(self, table: pa.Table) -> list[Score]:
        """Raises RewardError, which names the address and the cause, if the endpoint returns no usable answer."""
        question = {"samples": [asdict(sample) for sample in samples(table)]}
        most_bytes = ANSWER_BYTES + _SAMPLE_BYTES * table.num_rows
        answer = asyncio.run(self._endpoint.ask(question, monotonic() + self._total_s, most_bytes))
        return [_score(reward) for reward in self._rewards(answer, table.num_rows)]

    def _rewards(self, answer: Any, count: int) -> list[Any]:
        rewards = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(rewards, list) or len(rewards) != count:
            found = f"{len(rewards)} rewards" if isinstance(rewards, list) else repr(answer)[:200]
            raise RewardError(
                f"reward endpoint {self._endpoint.url} must answer {{'rewards': [...]}} with {count} items, one per "
                f"sample; got {found}."
            )
        return rewards


def build(reward: HttpSource, context: RewardContext) -> HttpReward:
    return HttpReward(reward, total_s=context.total_s)


def _score(reward: Any) -> Score:
    if reward is None:
        return Score(None, error="the reward endpoint answered null")
    number = finite_number(reward)
    if number is None:
        return Score(None, error=f"the reward endpoint answered {str(reward)[:80]!r}, not a finite number")
    return Score(number, {"http": number})
