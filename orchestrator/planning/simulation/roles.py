"""Simulated roles (orchestrator/roles.py): each call occupies devices of its pool for the time from costs.py."""

from __future__ import annotations

import asyncio
import functools
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from orchestrator.planning import costs
from orchestrator.planning.costs import Lengths
from orchestrator.planning.simulation.scenario import MODELS, Layout, Pool, Work
from orchestrator.roles import Tag
from orchestrator.turns import OFFLOAD
from orchestrator.types import (
    EvaluatedShard,
    Experience,
    Handle,
    Metrics,
    Moments,
    Prompt,
    PublishReport,
    RolloutShard,
    SampleRequest,
    ScoredShard,
    ShardRecord,
    ShardRequest,
    State,
)

_NO_PROMPT = Prompt("simulated", "", np.zeros(0, dtype=np.int32))
_SUMS = (
    "reward_sum reward_squares_sum kl_k1_token_sum kl_k3_token_sum response_length_squares_sum truncated_sum "
    "without_eos_sum mismatch_abs_token_sum mismatch_k3_token_sum return_token_sum return_squares_token_sum "
    "residual_token_sum residual_squares_token_sum"
).split()


class Devices:
    """Interchangeable devices, assigned in the order of requests."""

    def __init__(self, pool: Pool) -> None:
        self._free = pool.devices
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self.busy: defaultdict[str, float] = defaultdict(float)  # device seconds by role

    async def work(self, role: str, width: int, seconds: float, *, first: bool = False) -> None:
        """Occupies `width` devices for `seconds`; with `first` it goes to the front of the queue."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.insert(0 if first else len(self._waiting), (width, turn))
        self._lend()
        await turn
        await asyncio.sleep(seconds)
        self.busy[role] += width * seconds
        self._free += width
        self._lend()

    def _lend(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._free:
            width, turn = self._waiting.popleft()
            self._free -= width
            turn.set_result(None)


class Cluster:
    """The devices of a layout, and a coordinator that makes one call at a time."""

    def __init__(self, work: Work, layout: Layout) -> None:
        self.work, self.layout = work, layout
        self._devices = {role: devices for pool in layout.pools for devices in [Devices(pool)] for role in pool.widths}
        self._turns = {
            role: asyncio.Semaphore(layout.devices_of(role) // layout.scoring_ranks(role, work.scored))
            for role in MODELS
            if role in self._devices
        }
        self._coordinator = Devices(Pool(1, {}))
        self.lengths = functools.lru_cache(maxsize=layout.max_staleness + 2)(work.lengths)

    async def call(self, role: str, seconds: float, *, ranks: int) -> None:
        """Occupies `ranks` ranks of a model as soon as that many are free."""
        async with self._turns[role]:
            await self.run(role, seconds, calls=1 if self.layout.deals_on else ranks, width=ranks)

    async def run(
        self, role: str, seconds: float, *, calls: int, width: int | None = None, first: bool = False
    ) -> None:
        """Runs one call of a role.

        Args:
            calls: number of actors that the coordinator calls.
            width: number of devices to occupy. None: the role's default.
        """
        if calls_s := calls * self.layout.device.efficiency.call_s:
            await self._coordinator.work("coordinator", 1, calls_s)
        await self._devices[role].work(role, width or self.layout.width(role), seconds, first=first)

    async def meter(self, version: int) -> Metrics:  # noqa: ARG002  Protocol
        """Mean busy seconds of each role's devices since the last call."""
        await asyncio.sleep(self.layout.device.efficiency.step_s)
        busy = {role: devices.busy.pop(role, 0.0) for role, devices in self._devices.items()}
        return {f"busy/{role}_s": seconds / self.layout.devices_of(role) for role, seconds in busy.items()}


@dataclass(frozen=True)
class SimulatedSchedule:
    samples: int

    @functools.cached_property
    def _requests(self) -> Sequence[SampleRequest]:
        return [SampleRequest(row, _NO_PROMPT, 0, row) for row in range(self.samples)]

    def requests(self, step: int, _refill: int = 0) -> Sequence[SampleRequest]:  # noqa: ARG002  equal in all rounds
        return self._requests


class SimulatedRollouts:
    """Engines that each sample one shard at a time.

    Args:
        cache_tokens: capacity of one engine's KV cache.
    """

    def __init__(self, cluster: Cluster, cache_tokens: float) -> None:
        self._cluster, self._cache_tokens = cluster, cache_tokens
        self._are_on_host = False
        self._idle: asyncio.Queue[int] = asyncio.Queue()
        for engine in range(self.num_engines):
            self._idle.put_nowait(engine)

    @property
    def num_engines(self) -> int:
        return self._cluster.layout.engines

    async def generate(self, request: ShardRequest) -> RolloutShard:
        work, layout = self._cluster.work, self._cluster.layout
        rows = slice(request.requests[0].row, request.requests[-1].row + 1)
        prompts, responses = (lengths[rows] for lengths in self._cluster.lengths(request.step))
        seconds = costs.generate_seconds(
            work.policy,
            layout.device,
            width=layout.width("rollout"),
            prompt_tokens=prompts,
            new_tokens=responses,
            cache_tokens=self._cache_tokens,
        )
        engine = await self._idle.get()
        await self._cluster.run("rollout", seconds, calls=1)
        self._idle.put_nowait(engine)
        tokens = (int(prompts.sum()), int(responses.sum()))
        handle = (prompts, responses, work.are_learned(rows.start, len(prompts)))
        return RolloutShard(request.step, request.index, handle, len(prompts), *tokens, request.step, engine, seconds)

    async def wake(self, tags: Sequence[Tag]) -> None:
        if "weights" in tags and self._are_on_host:
            await self._move_weights()

    async def sleep(self, level: int) -> None:
        self._are_on_host = level == OFFLOAD
        if self._are_on_host:
            await self._move_weights()

    async def _move_weights(self) -> None:
        layout = self._cluster.layout
        width = layout.width("rollout")
        seconds = costs.wake_seconds(self._cluster.work.policy, layout.device, width=width)
        await self._cluster.run("rollout", seconds, calls=layout.engines, width=layout.engines * width)


@dataclass(frozen=True)
class SimulatedModel:
    """Policy, critic, reference or reward."""

    cluster: Cluster
    role: str
    has_head: bool

    @property
    def _place(self) -> str:
        """The role on whose ranks it computes."""
        return "policy" if self.role in self.cluster.work.on_trunk else self.role

    async def score(self, shard: RolloutShard) -> Sequence[Handle]:
        size, layout = self.cluster.work.models[self.role], self.cluster.layout
        if size is None:
            return [None]
        prompts, responses, _ = shard.handle
        ranks = layout.scoring_ranks(self._place, self.cluster.work.scored)
        seconds = costs.score_seconds(
            size,
            layout.device,
            layout.learning[self.role],
            ranks=ranks,
            lengths=self._lines(prompts, responses, sharing=self.cluster.work.of_prompt),
            head_tokens=self._head_tokens(responses),
            evenly=layout.deals_on,
        )
        await self.cluster.call(self._place, seconds, ranks=ranks)
        return [None]

    async def learn(self, experience: Experience) -> Metrics:
        size, layout = self.cluster.work.models[self.role], self.cluster.layout
        if size is not None:
            *lengths, learned = (np.concatenate(parts) for parts in zip(*experience.handles, strict=True))
            prompts, responses = (each[learned] for each in lengths)
            seconds = costs.learn_seconds(
                size,
                layout.device,
                layout.learning[self.role],
                ranks=layout.width(self._place),
                lengths=self._lines(prompts, responses, sharing=self.cluster.work.sharing),
                head_tokens=self._head_tokens(responses),
            )
            await self.cluster.call(self._place, seconds, ranks=layout.width(self._place))
        return {"epochs": 1.0}

    async def rest(self) -> None:
        """Moves the learner's states to the host; `resume` takes as long."""
        size, layout = self.cluster.work.models[self.role], self.cluster.layout
        if size is not None:
            ranks = layout.width(self._place)
            seconds = costs.rest_seconds(size, layout.device, layout.learning[self.role], ranks=ranks)
            await self.cluster.run(self._place, seconds, calls=ranks, width=ranks)

    resume = rest

    async def trim(self) -> None:
        """Takes no time."""

    def _lines(self, prompts: Lengths, responses: Lengths, *, sharing: int) -> Lengths:
        """Lengths of the computed lines. Reward model and critic compute each row separately."""
        if sharing == 1 or not self.has_head:
            return prompts + responses
        longest = self.cluster.layout.learning[self.role].micro_batch_tokens
        return costs.line_lengths(prompts, responses, sharing=sharing, longest=longest)

    def _head_tokens(self, responses: Lengths) -> float:
        return float(responses.sum()) if self.has_head else 0.0

    async def save(self, folder: Path) -> None:
        raise NotImplementedError("a simulation has no weights")

    load = export = save


@dataclass(frozen=True)
class SimulatedPublisher:
    """Waits for all engines, then occupies them together."""

    cluster: Cluster

    async def publish(self, version: int) -> PublishReport:
        size, layout = self.cluster.work.policy, self.cluster.layout
        seconds = costs.publish_seconds(size, layout.device, devices=layout.devices)
        await self.cluster.run(
            "rollout", seconds, calls=layout.engines, width=layout.devices_of("rollout"), first=not layout.takes_turns
        )
        return PublishReport(version, layout.engines, 0, int(size.weight_bytes), seconds, 0.0)


class SimulatedRecorder:
    """Writes nothing and takes no time: recorders run in parallel with the models."""

    async def record(
        self,
        shard: ScoredShard,
        *,
        state: State,  # noqa: ARG002  Protocol
        file: str,
    ) -> tuple[Handle, ShardRecord]:
        rollout = shard.rollout
        tokens = rollout.num_response_tokens
        sums = {"samples": float(rollout.num_samples), "response_tokens": float(tokens), **dict.fromkeys(_SUMS, 0.0)}
        record = ShardRecord(Path(file).name, "", 0, rollout.num_samples, 0, tokens, Moments(), sums, {})
        return rollout.handle, record

    async def load(self, record: ShardRecord, *, file: str) -> Handle:
        raise NotImplementedError("a simulation has no log to read")

    async def evaluate(self, shards: Sequence[EvaluatedShard], *, file: str) -> Metrics:
        raise NotImplementedError("a simulation has nothing to evaluate")
