"""Requests samples from the engines, at most `max_staleness` versions ahead of learning."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from orchestrator.concurrency import cancel, together
from orchestrator.roles import Rollouts
from orchestrator.turns import Turns, Unshared
from orchestrator.types import RolloutShard, SampleRequest, Sampling, ShardRequest


class Schedule(Protocol):
    """The samples of each step: a pure function of the step."""

    def requests(self, step: int, refill: int = 0) -> Sequence[SampleRequest]:
        """Args: refill: 0: the step's samples; above: those of other prompts, see PromptSchedule."""


@dataclass(frozen=True, eq=False)
class StepRollouts:
    """The shards of one step, each ready or still being sampled."""

    step: int
    shards: Sequence[Awaitable[RolloutShard]]


def cut_into_shards(
    step: int, requests: Sequence[SampleRequest], *, samples_per_shard: int, sampling: Sampling, first_index: int = 0
) -> list[ShardRequest]:
    """Splits requests in order. The split does not depend on the number of engines."""
    starts = range(0, len(requests), samples_per_shard)
    return [
        ShardRequest(step, index, requests[start : start + samples_per_shard], sampling)
        for index, start in enumerate(starts, start=first_index)
    ]


class Sampler:
    """Samples steps ahead of learning.

    Step k is sampled after version k - max_staleness is published. With `takes_turns` the engines share devices with
    other roles: `next` starts the sampling of a step, and the engines finish it before other roles compute.

    Args:
        turns: holds the devices during the sampling of a step, if `takes_turns`.
    """

    def __init__(
        self,
        rollouts: Rollouts,
        schedule: Schedule,
        *,
        sampling: Sampling,
        samples_per_shard: int,
        max_staleness: int,
        takes_turns: bool,
        turns: Turns = Unshared(),  # noqa: B008  it has no state
    ) -> None:
        self._rollouts = rollouts
        self._schedule = schedule
        self._sampling = sampling
        self._samples_per_shard = samples_per_shard
        self._max_staleness = max_staleness
        self._takes_turns = takes_turns
        self._turns = turns
        self._version = -1
        self._published = asyncio.Condition()
        self._begin()

    def _begin(self) -> None:
        self._asked_for = asyncio.Semaphore(0)
        self._ready: asyncio.Queue[StepRollouts | BaseException] = asyncio.Queue()
        self._shards: set[asyncio.Task[RolloutShard]] = set()

    @asynccontextmanager
    async def running(self, *, first_step: int, end_step: int) -> AsyncIterator[None]:
        """Samples these steps while the context lasts; unfinished samples are dropped at its end."""
        self._begin()
        producer = asyncio.create_task(self._produce(range(first_step, end_step)))
        try:
            yield
        finally:
            await cancel([producer, *self._shards])

    async def next(self) -> StepRollouts:
        """The shards of the next step. Raises errors of their sampling."""
        self._asked_for.release()
        ready = await self._ready.get()
        if isinstance(ready, BaseException):
            raise ready
        return ready

    async def more(self, step: int, refill: int, *, first_index: int) -> StepRollouts:
        """Samples further prompts for a step that `next` returned.

        Args:
            first_index: number of the first of these shards in the step.
        """
        return await self._sample(step, refill, first_index)

    async def announce(self, version: int) -> None:
        """Records that all engines now hold `version`."""
        async with self._published:
            self._version = version
            self._published.notify_all()

    async def _produce(self, steps: range) -> None:
        try:
            for step in steps:
                if self._takes_turns:
                    await self._asked_for.acquire()
                await self._wait_for_version(step - self._max_staleness)
                await self._ready.put(await self._sample(step))
        except Exception as error:  # noqa: BLE001  raised in next()
            await self._ready.put(error)

    async def _wait_for_version(self, version: int) -> None:
        async with self._published:
            await self._published.wait_for(lambda: self._version >= max(version, 0))

    async def _sample(self, step: int, refill: int = 0, first_index: int = 0) -> StepRollouts:
        requests = cut_into_shards(
            step,
            self._schedule.requests(step, refill),
            samples_per_shard=self._samples_per_shard,
            sampling=self._sampling,
            first_index=first_index,
        )
        if not self._takes_turns:
            return StepRollouts(step, self._start(requests))
        async with self._turns.hold("sample"):
            shards = self._start(requests)
            await together(shards)
        return StepRollouts(step, shards)

    def _start(self, requests: Sequence[ShardRequest]) -> Sequence[asyncio.Task[RolloutShard]]:
        shards = [asyncio.create_task(self._rollouts.generate(request)) for request in requests]
        self._shards.update(shards)
        for shard in shards:
            shard.add_done_callback(self._shards.discard)
        return shards
