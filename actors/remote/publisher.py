"""Sends the policy's weights to the engines."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, TypeVar

from actors.engines.contract import UpdateReport
from actors.groups.group import ActorGroup
from actors.groups.supervisor import RaySupervisor
from actors.remote.transports import HostTransport, Transport
from actors.roles.rollout import RolloutWorker
from actors.weights.sender import PublishingPolicy
from actors.weights.transports.broken import TransportBroken
from orchestrator.concurrency import together
from orchestrator.errors import PublishError
from orchestrator.types import PublishReport

R = TypeVar("R")
MOST_BREAKS = 2


@dataclass
class PolicyWeights:
    """The weights on the policy's ranks. The holder of the lock may learn or publish."""

    version: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class BucketPublisher:
    """Publishes in buckets, over one transport for all engines at once and through the host for one engine.

    A failed engine is restarted, and the publish starts again. If the transport breaks although all processes are
    alive, the publish starts again through the host; after MOST_BREAKS such breaks all later ones do. A failure of the
    policy leaves the publish incomplete: engines do not serve until a later one succeeds.

    Args:
        transport: between these policy and engines; None: the host.
        tell: gets a line for the console when the transport is given up.
        rouse: wakes engines that were restarted asleep; None: they are never asleep.
    """

    def __init__(  # noqa: PLR0913  its parts
        self,
        policy: ActorGroup,
        engines: ActorGroup,
        *,
        weights: PolicyWeights,
        supervisor: RaySupervisor,
        bucket_bytes: int,
        publish_s: float,
        transport: Transport | None = None,
        tell: Callable[[str], None] = lambda text: None,
        rouse: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._policy, self._engines, self._weights, self._supervisor = policy, engines, weights, supervisor
        self._bucket_bytes, self._publish_s, self._tell_user = bucket_bytes, publish_s, tell
        self._rouse = rouse
        self._host: Transport = HostTransport(policy, engines, publish_s=publish_s)
        self._transport = transport or self._host
        self.num_breaks = 0

    async def publish(self, version: int) -> PublishReport:
        async with self._weights.lock:
            self._weights.version = version
            return await self._supervisor.keep(
                self._engines, lambda: self._publish_to_all(version), prepare=self._rouse
            )

    async def catch_up(self, engine: int) -> None:
        """Sends the policy's current weights to one engine.

        Raises:
            RoleError: the engine failed again, or the policy did.
        """
        async with self._weights.lock:
            await self._publish(self._weights.version, [engine], self._host)

    async def _publish_to_all(self, version: int) -> PublishReport:
        engines = range(len(self._engines))
        try:
            return await self._publish(version, engines, self._transport)
        except TransportBroken as error:
            self.num_breaks += 1
            later = "" if self.num_breaks < MOST_BREAKS else ", and so do all later ones"
            self._tell_user(
                f"publishing over publish.transport={self._transport.name} failed ({error}); "
                f"version {version} goes through the host{later}"
            )
            if self.num_breaks >= MOST_BREAKS:
                self._transport = self._host
        return await self._publish(version, engines, self._host)

    async def _publish(self, version: int, engines: Sequence[int], transport: Transport) -> PublishReport:
        started = monotonic()
        packing = await transport.prepare()
        begun = await self._policy.call_all(
            PublishingPolicy.begin_publish, self._publish_s, self._bucket_bytes, packing
        )
        header = begun[0]
        await self._tell(engines, RolloutWorker.begin_update, header)
        await transport.carry(header, engines)
        reports = await self._tell(engines, RolloutWorker.finish_update, version)
        await self._policy.call_all(PublishingPolicy.end_publish, self._publish_s)
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

    async def _tell(self, engines: Sequence[int], method: Callable[..., R], argument: Any) -> list[R]:
        return await together(self._engines.call(engine, method, self._publish_s, argument) for engine in engines)


def _slowest(reports: Sequence[UpdateReport], *parts: str) -> float:
    return max(sum(report.seconds.get(part, 0.0) for part in parts) for report in reports)
