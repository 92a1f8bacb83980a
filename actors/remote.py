"""The roles of orchestrator/roles.py, served by groups of Ray actors."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

import pyarrow as pa

from actors.engines import RolloutWorker
from actors.group import ActorGroup
from actors.learning.worker import LearnJob
from actors.process import Process, Several
from actors.recorder import RecorderWorker
from actors.weights.sender import PublishingPolicy
from orchestrator.concurrency import together
from orchestrator.errors import PublishError
from orchestrator.types import (
    EvaluatedShard,
    Experience,
    Handle,
    Metrics,
    PublishReport,
    RolloutShard,
    ScoredShard,
    ShardRecord,
    ShardRequest,
)

ScoreMethod = Callable[[Any, pa.Table], pa.Table]


class RayRollouts:
    """Engines that take shards in turn, one shard at a time each.

    Args:
        group: one actor per engine (rank 0 of its tensor-parallel group).
        sleeps: whether engines share GPUs with learners and must sleep while those compute.
    """

    def __init__(self, group: ActorGroup, *, generate_s: float, sleeps: bool) -> None:
        self._group = group
        self._generate_s = generate_s
        self._sleeps = sleeps
        self._idle: asyncio.Queue[int] = asyncio.Queue()
        for rank in range(len(group)):
            self._idle.put_nowait(rank)

    @property
    def num_engines(self) -> int:
        return len(self._group)

    async def generate(self, request: ShardRequest) -> RolloutShard:
        engine = await self._idle.get()
        started = monotonic()
        try:
            handle, counts = await self._group.call_for_bulk(engine, RolloutWorker.generate, self._generate_s, request)
        finally:
            self._idle.put_nowait(engine)
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

    async def wake(self) -> None:
        if self._sleeps:
            await self._group.call_all(RolloutWorker.wake, self._generate_s)

    async def sleep(self) -> None:
        if self._sleeps:
            await self._group.call_all(RolloutWorker.sleep, self._generate_s)


class ReplicatedScorer:
    """Replicas that each score whole shards, in turn."""

    def __init__(self, group: ActorGroup, method: ScoreMethod, *, score_s: float) -> None:
        self._group, self._method, self._score_s = group, method, score_s
        self._turn = itertools.cycle(range(len(group)))

    async def score(self, shard: RolloutShard) -> Sequence[Handle]:
        handle, _ = await self._group.call_for_bulk(next(self._turn), self._method, self._score_s, shard.handle)
        return [handle]


class ShardedScorer:
    """Ranks of one model that score a shard together, each its own rows of it."""

    def __init__(self, group: ActorGroup, method: ScoreMethod, *, score_s: float) -> None:
        self._group, self._method, self._score_s = group, method, score_s

    async def score(self, shard: RolloutShard) -> Sequence[Handle]:
        parts = await together(
            self._group.call_for_bulk(rank, self._method, self._score_s, shard.handle)
            for rank in range(len(self._group))
        )
        return [handle for handle, _ in parts]


class Learns(Protocol):
    """What PolicyWorker and CriticWorker have in common."""

    def learn(self, tables: list[pa.Table], job: LearnJob) -> dict[str, float]: ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...

    def export(self, folder: Path) -> None: ...


class RayLearner(ShardedScorer):
    """The policy or the critic: all ranks score, learn and save together."""

    def __init__(
        self, group: ActorGroup, method: ScoreMethod, *, seed: int, score_s: float, learn_s: float, save_s: float
    ) -> None:
        super().__init__(group, method, score_s=score_s)
        self._seed, self._learn_s, self._save_s = seed, learn_s, save_s

    async def learn(self, experience: Experience) -> Metrics:
        job = LearnJob(
            experience.step,
            advantage_mean=experience.advantage_mean,
            advantage_std=experience.advantage_std,
            kl_coefficient=experience.kl_coefficient,
            seed=self._seed,
        )
        metrics = await self._group.call_all(Learns.learn, self._learn_s, Several(experience.handles), job)
        return metrics[0]

    async def save(self, folder: Path) -> None:
        await self._group.call_all(Learns.save, self._save_s, folder)

    async def load(self, folder: Path) -> None:
        await self._group.call_all(Learns.load, self._save_s, folder)

    async def export(self, folder: Path) -> None:
        await self._group.call_all(Learns.export, self._save_s, folder)


class BucketPublisher:
    """Carries the policy's weights to every engine through the object store, one bucket at a time.

    While the engines take in one bucket the policy packs the next; at most two live at once. An engine that fails
    leaves the publish incomplete: it does not serve until a later one succeeds.
    """

    def __init__(self, policy: ActorGroup, engines: ActorGroup, *, bucket_bytes: int, publish_s: float) -> None:
        self._policy, self._engines = policy, engines
        self._bucket_bytes, self._publish_s = bucket_bytes, publish_s

    async def publish(self, version: int) -> PublishReport:
        started = monotonic()
        header = (await self._policy.call_all(PublishingPolicy.begin_publish, self._publish_s, self._bucket_bytes))[0]
        await self._engines.call_all(RolloutWorker.begin_update, self._publish_s, header)
        upcoming = asyncio.ensure_future(self._next_bucket())
        for index in range(header.num_buckets):
            bucket = await upcoming
            if index + 1 < header.num_buckets:
                upcoming = asyncio.ensure_future(self._next_bucket())
            await self._engines.call_all(RolloutWorker.receive_bucket, self._publish_s, bucket)
        reports = await self._engines.call_all(RolloutWorker.finish_update, self._publish_s, version)
        behind = [engine for engine, report in enumerate(reports) if report.version != version]
        if behind:
            raise PublishError(f"engines {behind} do not hold version {version} after its publish; restart them.")
        return PublishReport(
            version,
            num_engines=len(reports),
            num_tensors=min(report.num_compared or report.num_tensors for report in reports),
            num_bytes=header.num_bytes,
            seconds=monotonic() - started,
        )

    async def _next_bucket(self) -> Handle:
        """Every rank takes part (ZeRO-3 gathers); the bucket is rank 0's."""
        parts = await together(
            self._policy.call_for_bulk(rank, PublishingPolicy.next_bucket, self._publish_s)
            for rank in range(len(self._policy))
        )
        return parts[0][0]


class RayRecorder:
    """Recorder processes, in turn."""

    def __init__(self, group: ActorGroup, *, record_s: float) -> None:
        self._group, self._record_s = group, record_s
        self._turn = itertools.cycle(range(len(group)))

    async def record(self, shard: ScoredShard, *, kl_coefficient: float, file: str) -> tuple[Handle, ShardRecord]:
        scores = {
            "logprobs": list(shard.old_logprobs),
            "ref_logprobs": list(shard.ref_logprobs),
            "values": list(shard.values),
            "rewards": list(shard.rewards),
        }
        return await self._group.call_for_bulk(
            next(self._turn),
            RecorderWorker.record,
            self._record_s,
            shard.rollout.handle,
            scores,
            kl_coefficient=kl_coefficient,
            file=file,
        )

    async def load(self, record: ShardRecord, *, file: str) -> Handle:
        handle, _ = await self._group.call_for_bulk(
            next(self._turn), RecorderWorker.load, self._record_s, record, file=file
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
        return await self._group.call(next(self._turn), RecorderWorker.evaluate, self._record_s, joined, file=file)


class ClusterMeter:
    """Seconds each role was busy since the last call, and the memory of its largest process."""

    def __init__(self, groups: Mapping[str, ActorGroup], *, run_id: str, deadline_s: float = 60.0) -> None:
        self._groups, self._run_id, self._deadline_s = groups, run_id, deadline_s

    async def __call__(self, version: int) -> Metrics:
        busy = {f"busy/{role}_s": group.busy.take() for role, group in self._groups.items()}
        memory = await together(self._rss(role, group, version) for role, group in self._groups.items())
        return {**busy, **dict(memory)}

    async def _rss(self, role: str, group: ActorGroup, version: int) -> tuple[str, float]:
        sizes = await together(
            group.call(rank, Process.report, self._deadline_s, self._run_id, role, rank, version)
            for rank in range(len(group))
        )
        group.busy.take()
        return f"memory/{role}_rss_bytes", max(sizes)
