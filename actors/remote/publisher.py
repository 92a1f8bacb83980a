"""Sends the policy's weights to the engines through Ray's object store."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, TypeVar

from actors.engines.contract import UpdateReport
from actors.groups.group import ActorGroup
from actors.groups.supervisor import RaySupervisor
from actors.roles.rollout import RolloutWorker
from actors.weights.sender import PublishingPolicy
from orchestrator.concurrency import cancel, together
from orchestrator.errors import PublishError
from orchestrator.types import Handle, PublishReport

R = TypeVar("R")


@dataclass
class PolicyWeights:
    """The weights on the policy's ranks. The holder of the lock may learn or publish."""

    version: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class BucketPublisher:
    """Publishes in buckets. While the engines apply one bucket the policy packs the next; at most two exist at once.

    A failed engine is restarted, and the publish starts again. A failure of the policy leaves the publish incomplete:
    engines do not serve until a later one succeeds.

    Args:
        rouse: wakes engines that were restarted asleep; null: they are never asleep.
    """

    def __init__(
        self,
        policy: ActorGroup,
        engines: ActorGroup,
        *,
        weights: PolicyWeights,
        supervisor: RaySupervisor,
        bucket_bytes: int,
        publish_s: float,
        rouse: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._policy, self._engines, self._weights, self._supervisor = policy, engines, weights, supervisor
        self._bucket_bytes, self._publish_s = bucket_bytes, publish_s
        self._rouse = rouse

    async def publish(self, version: int) -> PublishReport:
        async with self._weights.lock:
            self._weights.version = version
            everyone = range(len(self._engines))
            return await self._supervisor.keep(
                self._engines, lambda: self._publish(version, everyone), prepare=self._rouse
            )

    async def catch_up(self, engine: int) -> None:
        """Sends the policy's current weights to one engine.

        Raises:
            RoleError: the engine failed again, or the policy did.
        """
        async with self._weights.lock:
            await self._publish(self._weights.version, [engine])

    async def _publish(self, version: int, engines: Sequence[int]) -> PublishReport:
        started = monotonic()
        header = (await self._policy.call_all(PublishingPolicy.begin_publish, self._publish_s, self._bucket_bytes))[0]
        await self._tell(engines, RolloutWorker.begin_update, header)
        await self._carry(header.num_buckets, engines)
        reports = await self._tell(engines, RolloutWorker.finish_update, version)
        behind = [engine for engine, report in zip(engines, reports, strict=True) if report.version != version]
        if behind:
            raise PublishError(f"engines {behind} do not hold version {version} after its publish; restart them.")
        return PublishReport(
            version,
            num_engines=len(reports),
            num_tensors=min(report.num_compared or report.num_tensors for report in reports),
            num_bytes=header.num_bytes,
            seconds=monotonic() - started,
            verify_s=_slowest(reports, "receive", "verify"),
            apply_s=_slowest(reports, "apply"),
        )

    async def _carry(self, num_buckets: int, engines: Sequence[int]) -> None:
        upcoming = asyncio.ensure_future(self._next_bucket())
        try:
            for index in range(num_buckets):
                bucket = await upcoming
                if index + 1 < num_buckets:
                    upcoming = asyncio.ensure_future(self._next_bucket())
                await self._tell(engines, RolloutWorker.receive_bucket, bucket)
        finally:
            await cancel([upcoming])

    async def _tell(self, engines: Sequence[int], method: Callable[..., R], argument: Any) -> list[R]:
        return await together(self._engines.call(engine, method, self._publish_s, argument) for engine in engines)

    async def _next_bucket(self) -> Handle:
        """All ranks take part (ZeRO-3 gathers); returns rank 0's bucket."""
        parts = await together(
            self._policy.call_for_bulk(rank, PublishingPolicy.next_bucket, self._publish_s)
            for rank in range(len(self._policy))
        )
        return parts[0][0]


def _slowest(reports: Sequence[UpdateReport], *parts: str) -> float:
    return max(sum(report.seconds.get(part, 0.0) for part in parts) for report in reports)
