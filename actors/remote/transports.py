"""How the buckets of a publish get from the policy's ranks to the engines: the part that runs in the driver.

    prepare   connects both sides, if that is needed
    carry     moves all buckets of a publish that both sides have begun

`begin` and `finish` of a publish are the same for all transports, see actors/remote/publisher.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import ray
from torch._C._distributed_c10d import PrefixStore, TCPStore

from actors.groups.group import ActorGroup
from actors.roles.rollout import RolloutWorker
from actors.weights.manifest import WeightHeader
from actors.weights.sender import Packing, PublishingPolicy
from actors.weights.transports.broken import TransportBroken
from actors.weights.transports.group import STOP, Rendezvous
from actors.weights.transports.shared import SharedBucket
from orchestrator.concurrency import cancel, together
from orchestrator.types import Handle

T = TypeVar("T")


class Transport(Protocol):
    name: str

    async def prepare(self) -> Packing:
        """Returns how the policy is to pack. Raises TransportBroken."""

    async def carry(self, header: WeightHeader, engines: Sequence[int]) -> None:
        """Raises:
        TransportBroken: all processes are alive, but the weights can't get through.
        RoleError: of the rank that is gone or stopped, not of those that wait for it.
        """


class HostTransport:
    """Through Ray's object store. While the engines apply one bucket the policy packs the next; at most two exist at
    once. Engines fail alone, so this is also the way to a single engine and the fallback of all others."""

    name = "host"

    def __init__(self, policy: ActorGroup, engines: ActorGroup, *, publish_s: float) -> None:
        self._policy, self._engines, self._publish_s = policy, engines, publish_s

    async def prepare(self) -> Packing:
        return Packing()

    async def carry(self, header: WeightHeader, engines: Sequence[int]) -> None:
        await _relay(header.num_buckets, self._next_bucket, self._engines, engines, self._publish_s)

    async def _next_bucket(self) -> Handle:
        """All ranks take part (ZeRO-3 gathers); returns rank 0's bucket."""
        parts = await together(
            self._policy.call_for_bulk(rank, PublishingPolicy.next_bucket, self._publish_s)
            for rank in range(len(self._policy))
        )
        return parts[0][0]


async def _relay(
    count: int,
    make: Callable[[], Awaitable[Any]],
    group: ActorGroup,
    engines: Sequence[int],
    publish_s: float,
) -> None:
    """Gives `count` parcels to the engines, one after another. While they apply one, the next is made."""
    upcoming = asyncio.ensure_future(make())
    try:
        for number in range(1, count + 1):
            parcel = await upcoming
            if number < count:
                upcoming = asyncio.ensure_future(make())
            await together(group.call(e, RolloutWorker.receive_bucket, publish_s, parcel) for e in engines)
    finally:
        await cancel([upcoming])


class CollectiveTransport:
    """By broadcast from the policy's rank 0 to all workers of all engines: NCCL on GPUs, gloo on CPUs.

    The group is formed at the first publish, and again after any of its processes was replaced or the group broke.

    Args:
        workers_per_engine: processes of an engine that each receive all weights (tensor parallelism).
    """

    name = "collective"

    def __init__(
        self, policy: ActorGroup, engines: ActorGroup, *, publish_s: float, workers_per_engine: int = 1
    ) -> None:
        self._policy, self._engines, self._publish_s = policy, engines, publish_s
        self._workers = workers_per_engine
        self._numbers = itertools.count(1)
        self._store: TCPStore | None = None
        self._group = ""  # name of the group
        self._members: Any = None  # the processes that formed it; None: no group

    async def prepare(self) -> Packing:
        members = dict(self._policy.births), dict(self._engines.births)
        if members != self._members:
            self._members = None
            await self._meet()
            self._members = members
        return Packing(where="device")

    async def carry(self, header: WeightHeader, engines: Sequence[int]) -> None:
        count, publish_s = header.num_buckets, self._publish_s
        receiving = [self._engines.call(e, RolloutWorker.receive_broadcast, publish_s, count) for e in engines]
        ranks = range(len(self._policy))
        sending = [self._policy.call(r, PublishingPolicy.broadcast, publish_s, count) for r in ranks]
        await self._all_or_stop([*receiving, *sending])

    async def _meet(self) -> None:
        address = str(ray.util.get_node_ip_address())
        if self._store is None:
            self._store = _store_at(address, self._publish_s)
        self._group = f"publish-{next(self._numbers)}"
        meeting = Rendezvous(
            address,
            self._store.port,
            self._group,
            world_size=1 + len(self._engines) * self._workers,
            limit_s=0.8 * self._publish_s,  # so that those who wait give up before their own call is overdue
        )
        joining = [
            self._engines.call(e, RolloutWorker.join, self._publish_s, meeting, 1 + e * self._workers)
            for e in range(len(self._engines))
        ]
        await self._all_or_stop([*joining, self._policy.call(0, PublishingPolicy.join, self._publish_s, meeting)])

    async def _all_or_stop(self, calls: Sequence[Awaitable[Any]]) -> None:
        """Awaits all calls, which wait for each other. After the first failure it stops the group, so that the others
        end soon. An error of a process that is itself at fault is raised before those of processes that waited."""
        tasks = [asyncio.ensure_future(call) for call in calls]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            failed = [task.exception() for task in tasks if task.done() and task.exception()]
            if not failed:
                return
            self._stop(str(failed[0]))
            await asyncio.wait(tasks)
            errors = [error for error in (task.exception() for task in tasks) if error is not None]
            raise next((error for error in errors if not isinstance(error, TransportBroken)), errors[0])
        finally:
            if not all(task.done() for task in tasks):
                self._stop("the driver gave up")
            await cancel(tasks)

    def _stop(self, reason: str) -> None:
        self._members = None
        if self._store is not None:
            with contextlib.suppress(RuntimeError):
                PrefixStore(self._group, self._store).set(STOP, reason)


def _store_at(address: str, limit_s: float) -> TCPStore:
    """A key-value store that listens on this address only: loopback, if that is where this Ray is."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, 0), family=family)
    port, descriptor = listener.getsockname()[1], listener.detach()
    limit = timedelta(seconds=limit_s)
    return TCPStore(address, port, None, True, limit, wait_for_workers=False, master_listen_fd=descriptor)


class SharedTransport:
    """Through memory that the policy's ranks share with the engines on the same device: CUDA IPC, or a file in memory.
    On each device with an engine, one rank of the policy packs."""

    name = "shared"

    def __init__(self, policy: ActorGroup, engines: ActorGroup, *, publish_s: float) -> None:
        self._policy, self._engines, self._publish_s = policy, engines, publish_s

    async def prepare(self) -> Packing:
        """Ranks on devices without an engine do not pack: nobody would map what they export."""
        places = await self._policy.call_all(PublishingPolicy.device_id, self._publish_s)
        found = await self._engines.call_all(RolloutWorker.device_ids, self._publish_s)
        wanted = {place for of_one in found for place in of_one}
        if alone := sorted(wanted - set(places)):
            raise TransportBroken(f"no rank of the policy is on the devices {', '.join(alone)} of engines")
        first = {place: rank for rank, place in reversed(list(enumerate(places))) if place in wanted}
        return Packing(ranks=tuple(sorted(first.values())), where="shared")

    async def carry(self, header: WeightHeader, engines: Sequence[int]) -> None:
        """In both buffers of each rank in turn: one is filled while the engines read the other."""
        await _relay(header.num_buckets, self._share, self._engines, engines, self._publish_s)

    async def _share(self) -> SharedBucket:
        parts = await self._policy.call_all(PublishingPolicy.share_bucket, self._publish_s)
        first, *others = [part for part in parts if part is not None]
        handles = dict(first.handles)
        for other in others:
            handles.update(other.handles)
        return SharedBucket(first.index, first.num_bytes, first.digests, handles)
