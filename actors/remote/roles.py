"""The roles of orchestrator/roles.py, served by groups of Ray actors."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Protocol, TypeVar

import pyarrow as pa

from actors.groups.group import ActorGroup
from actors.groups.process import Process, Several
from actors.groups.supervisor import RaySupervisor
from actors.learning.objectives.objective import LearnJob
from actors.learning.worker import Share
from actors.remote.publisher import PolicyWeights
from actors.roles.recorder import RecorderWorker
from actors.roles.rollout import RolloutWorker
from orchestrator.concurrency import together
from orchestrator.errors import RoleError
from orchestrator.roles import Tag
from orchestrator.types import (
    EvaluatedShard,
    Experience,
    Handle,
    Metrics,
    PromptGroup,
    RolloutShard,
    ScoredShard,
    ShardRecord,
    ShardRequest,
    State,
)

T = TypeVar("T")
ScoreMethod = Callable[..., pa.Table]


async def _kept(
    supervisor: RaySupervisor | None,
    group: ActorGroup,
    work: Callable[[], Awaitable[T]],
    prepare: Callable[[], Awaitable[Any]] | None = None,
) -> T:
    return await (work() if supervisor is None else supervisor.keep(group, work, prepare))


async def _trim(supervisor: RaySupervisor | None, group: ActorGroup, deadline_s: float) -> None:
    await _kept(supervisor, group, lambda: group.call_all(Process.trim, deadline_s))


class RayRollouts:
    """Engines that each sample one shard at a time.

    Args:
        group: one actor per engine (rank 0 of its tensor-parallel group).
        sleeps: whether engines share GPUs with learners and must sleep while those compute.
        supervisor: restarts an engine that fails; `catch_up` brings it to the current weights, and it gets its shard
            again. Null: a failure is raised.
    """

    def __init__(
        self,
        group: ActorGroup,
        *,
        generate_s: float,
        sleeps: bool,
        supervisor: RaySupervisor | None = None,
        catch_up: Callable[[int], Awaitable[Any]] | None = None,
    ) -> None:
        self._group, self._supervisor, self._catch_up = group, supervisor, catch_up
        self._generate_s = generate_s
        self._sleeps = sleeps
        self._awake: list[Tag] = []
        self._idle: asyncio.Queue[int] = asyncio.Queue()
        for rank in range(len(group)):
            self._idle.put_nowait(rank)

    @property
    def num_engines(self) -> int:
        return len(self._group)

    async def generate(self, request: ShardRequest) -> RolloutShard:
        engine = await self._idle.get()

        async def prepare() -> None:
            await self.rouse([engine])
            if self._catch_up:
                await self._catch_up(engine)

        try:
            return await _kept(self._supervisor, self._group, lambda: self._generate(engine, request), prepare)
        finally:
            self._idle.put_nowait(engine)

    async def _generate(self, engine: int, request: ShardRequest) -> RolloutShard:
        started = monotonic()
        handle, counts = await self._group.call_for_bulk(engine, RolloutWorker.generate, self._generate_s, request)
        return RolloutShard(
            request.step,
            request.index,
            handle,
            num_samples=counts["num_samples"],
            num_prompt_tokens=counts["num_prompt_tokens"],
            num_response_tokens=counts["num_response_tokens"],
            version=counts["version"],
            engine=engine,
            seconds=monotonic() - started,
        )

    async def wake(self, tags: Sequence[Tag]) -> None:
        """Engines that have to be restarted get the current weights if they are to sample."""
        if not self._sleeps:
            return
        self._awake += [tag for tag in tags if tag not in self._awake]
        seen = dict(self._group.births)
        await _kept(self._supervisor, self._group, self.rouse)
        if "kv_cache" in tags and self._catch_up:
            for rank in [rank for rank, births in self._group.births.items() if births != seen.get(rank)]:
                await self._catch_up(rank)

    async def sleep(self, level: int) -> None:
        if self._sleeps:
            self._awake = []
            await _kept(
                self._supervisor,
                self._group,
                lambda: self._group.call_all(RolloutWorker.sleep, self._generate_s, level),
            )

    async def rouse(self, ranks: Sequence[int] | None = None) -> None:
        """Wakes what is awake in the present phase: an engine is asleep when it is ready."""
        if self._awake:
            ranks = range(len(self._group)) if ranks is None else ranks
            await together(
                self._group.call(rank, RolloutWorker.wake, self._generate_s, tuple(self._awake)) for rank in ranks
            )


class ReplicatedScorer:
    """Replicas that each score whole shards, in turn."""

    def __init__(
        self, group: ActorGroup, method: ScoreMethod, *, score_s: float, supervisor: RaySupervisor | None = None
    ) -> None:
        self._group, self._method, self._score_s, self._supervisor = group, method, score_s, supervisor
        self._turn = itertools.cycle(range(len(group)))

    async def score(self, shard: RolloutShard) -> Sequence[Handle]:
        rank = next(self._turn)
        handle, _ = await _kept(
            self._supervisor,
            self._group,
            lambda: self._group.call_for_bulk(rank, self._method, self._score_s, shard.handle),
        )
        return [handle]

    async def trim(self) -> None:
        await _trim(self._supervisor, self._group, self._score_s)


class ShardedScorer:
    """Ranks that score. The ranks are divided among the shards of a step, and a shard's rows among its ranks.

    Args:
        shards_per_step: number of shards that share the ranks. None: each shard needs all ranks, which hold parts of
            one model (ZeRO-3).
    """

    def __init__(
        self,
        group: ActorGroup,
        method: ScoreMethod,
        *,
        shards_per_step: int | None,
        score_s: float,
        supervisor: RaySupervisor | None = None,
    ) -> None:
        self._group, self._method, self._score_s, self._supervisor = group, method, score_s, supervisor
        self._shards_per_step = shards_per_step

    async def score(self, shard: RolloutShard) -> Sequence[Handle]:
        return await _kept(self._supervisor, self._group, lambda: self._score(shard))

    async def _score(self, shard: RolloutShard) -> Sequence[Handle]:
        parts = await together(
            self._group.call_for_bulk(rank, self._method, self._score_s, shard.handle, share)
            for rank, share in self._shares(shard.index)
        )
        return [handle for handle, _ in parts]

    async def trim(self) -> None:
        await _trim(self._supervisor, self._group, self._score_s)

    def _shares(self, shard: int) -> list[tuple[int, Share | None]]:
        num_ranks = len(self._group)
        if self._shards_per_step is None:
            return [(rank, None) for rank in range(num_ranks)]
        width = max(1, num_ranks // self._shards_per_step)
        return [((shard * width + index) % num_ranks, Share(index, width)) for index in range(width)]


class Learns(Protocol):
    """The common interface of PolicyWorker and CriticWorker."""

    def learn(self, tables: list[pa.Table], job: LearnJob) -> dict[str, float]: ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...

    def export(self, folder: Path) -> None: ...

    def rest(self, *, keeps_weights: bool = False) -> None: ...

    def resume(self) -> None: ...


@dataclass(frozen=True)
class LearnMethods:
    """The methods of a worker that a learner calls. A critic on the policy's trunk is called by others."""

    score: ScoreMethod
    learn: Callable[..., dict[str, float]] = Learns.learn
    save: Callable[..., None] = Learns.save
    load: Callable[..., None] = Learns.load


class RayLearner(ShardedScorer):
    """The policy or the critic: all ranks score, learn and save together. Calls are not retried after a failure: the
    state of the ranks would be lost or ahead.

    Args:
        weights: locked while the policy learns; None for the critic, which publishes nothing.
    """

    def __init__(
        self,
        group: ActorGroup,
        methods: LearnMethods,
        *,
        seed: int,
        shards_per_step: int | None,
        score_s: float,
        learn_s: float,
        save_s: float,
        weights: PolicyWeights | None = None,
    ) -> None:
        super().__init__(group, methods.score, shards_per_step=shards_per_step, score_s=score_s)
        self._seed, self._learn_s, self._save_s = seed, learn_s, save_s
        self._weights, self._methods = weights or PolicyWeights(), methods

    async def learn(self, experience: Experience) -> Metrics:
        job = LearnJob(
            experience.step,
            advantage_mean=experience.advantage_mean,
            advantage_std=experience.advantage_std,
            kl_coefficient=experience.kl_coefficient,
            seed=self._seed,
        )
        async with self._weights.lock:
            metrics = await self._group.call_all(self._methods.learn, self._learn_s, Several(experience.handles), job)
            self._weights.version = experience.step + 1
        return metrics[0]

    async def save(self, folder: Path) -> None:
        await self._group.call_all(self._methods.save, self._save_s, folder)

    async def load(self, folder: Path) -> None:
        await self._group.call_all(self._methods.load, self._save_s, folder)

    async def export(self, folder: Path) -> None:
        await self._group.call_all(Learns.export, self._save_s, folder)

    async def rest(self) -> None:
        await self._group.call_all(Learns.rest, self._save_s, keeps_weights=True)

    async def resume(self) -> None:
        await self._group.call_all(Learns.resume, self._save_s)


class RayRecorder:
    """Recorder processes, used in turn."""

    def __init__(self, group: ActorGroup, *, record_s: float, supervisor: RaySupervisor | None = None) -> None:
        self._group, self._record_s, self._supervisor = group, record_s, supervisor
        self._turn = itertools.cycle(range(len(group)))

    async def record(self, shard: ScoredShard, *, state: State, file: str) -> tuple[Handle, ShardRecord]:
        rank = next(self._turn)
        return await _kept(
            self._supervisor,
            self._group,
            lambda: self._group.call_for_bulk(
                rank,
                RecorderWorker.record,
                self._record_s,
                shard.rollout.handle,
                shard.scores(),
                kl_coefficient=state.kl_coefficient,
                file=file,
                groups=shard.groups,
                earlier=state.part_moments,
            ),
        )

    async def groups(self, shard: ScoredShard) -> Sequence[PromptGroup]:
        rank = next(self._turn)
        handles = (shard.rollout.handle, list(shard.rewards))
        return await _kept(
            self._supervisor,
            self._group,
            lambda: self._group.call(rank, RecorderWorker.groups, self._record_s, *handles),
        )

    async def load(self, record: ShardRecord, *, file: str) -> Handle:
        rank = next(self._turn)
        handle, _ = await _kept(
            self._supervisor,
            self._group,
            lambda: self._group.call_for_bulk(rank, RecorderWorker.load, self._record_s, record, file=file),
        )
        return handle

    async def evaluate(self, shards: Sequence[EvaluatedShard], *, file: str) -> Metrics:
        joined = [
            {
                "rollout": [shard.rollout.handle],
                "policy": list(shard.logprobs),
                "reference": list(shard.ref_logprobs),
                "reward": list(shard.rewards),
            }
            for shard in shards
        ]
        rank = next(self._turn)
        return await _kept(
            self._supervisor,
            self._group,
            lambda: self._group.call(rank, RecorderWorker.evaluate, self._record_s, joined, file=file),
        )


class ClusterMeter:
    """Busy seconds of each role since the last call, and the memory of its largest process.

    A role that does not answer is omitted: its next call will report the failure.
    """

    def __init__(self, groups: Mapping[str, ActorGroup], *, run_id: str, deadline_s: float = 10.0) -> None:
        self._groups, self._run_id, self._deadline_s = groups, run_id, deadline_s

    async def __call__(self, version: int) -> Metrics:
        busy = {f"busy/{role}_s": group.busy.take() for role, group in self._groups.items()}
        memory = await together(self._rss(role, group, version) for role, group in self._groups.items())
        return {**busy, **{name: size for part in memory for name, size in part.items()}}

    async def _rss(self, role: str, group: ActorGroup, version: int) -> Metrics:
        try:
            sizes = await together(
                group.call(rank, Process.report, self._deadline_s, self._run_id, role, rank, version)
                for rank in range(len(group))
            )
        except RoleError:
            return {}
        group.busy.take()
        return {f"memory/{role}_rss_bytes": max(sizes)}
