"""The driver's side of transports, over groups whose actors are scripted."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
import torch

from actors.engines.contract import UpdateReport
from actors.remote.publisher import BucketPublisher, PolicyWeights
from actors.remote.transports import CollectiveTransport, HostTransport, SharedTransport
from actors.weights.manifest import WeightHeader, plan
from actors.weights.sender import Packing
from actors.weights.transports.broken import TransportBroken
from actors.weights.transports.shared import SharedBucket
from benchmarks.publish import AsIs
from orchestrator.errors import PublishError, RoleDied

HEADER = plan([("weight", torch.float32, (4,))], bucket_bytes=64)
DIED = RoleDied("rollout", 1, "receive_broadcast", "gone")


class Scripted:
    """A group of actors; `answers` give the result or the error of each method by rank, after some seconds."""

    def __init__(self, role: str, size: int, **answers: Callable[[int], tuple[float, Any]]) -> None:
        self.role, self.births, self._size, self._answers = role, dict[int, int](), size, answers
        self.calls: list[tuple[str, int]] = []

    def __len__(self) -> int:
        return self._size

    async def call(self, rank: int, method: Callable[..., Any], deadline_s: float, *arguments: Any) -> Any:
        name = method.__name__
        self.calls.append((name, rank))
        delay_s, answer = self._answers.get(name, lambda rank: (0.0, None))(rank)
        await asyncio.sleep(delay_s)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def call_all(self, method: Callable[..., Any], deadline_s: float, *arguments: Any) -> list[Any]:
        return [await self.call(rank, method, deadline_s, *arguments) for rank in range(self._size)]

    async def call_for_bulk(self, rank: int, method: Callable[..., Any], deadline_s: float) -> tuple[Any, Any]:
        return await self.call(rank, method, deadline_s), None


def collective(policy: Any, engines: Any) -> CollectiveTransport:
    return CollectiveTransport(policy, engines, publish_s=5.0)


@pytest.mark.parametrize(
    ("of_engine", "expected"),
    [
        (lambda rank: (0.0, TransportBroken("engine 0 waited")) if rank == 0 else (0.05, DIED), RoleDied),
        (lambda rank: (0.0, DIED) if rank else (0.05, TransportBroken("engine 0 waited")), RoleDied),
        (
            lambda rank: (0.0, PublishError("weight differs")) if rank else (0.05, TransportBroken("waited")),
            PublishError,
        ),
        (lambda rank: (0.0, TransportBroken("no route")) if rank else (0.0, None), TransportBroken),
    ],
)
async def test_the_error_of_the_process_at_fault_is_raised_not_those_of_processes_that_waited(
    of_engine: Callable[[int], tuple[float, Any]], expected: type[Exception]
) -> None:
    policy = Scripted("policy", 2, broadcast=lambda rank: (0.02, TransportBroken("rank 0 waited")))
    engines = Scripted("rollout", 2, receive_broadcast=of_engine)
    with pytest.raises(expected):
        await collective(policy, engines).carry(HEADER, [0, 1])
    assert len(engines.calls) == len(policy.calls) == 2


async def test_a_group_is_formed_once_and_again_after_an_actor_was_replaced() -> None:
    policy, engines = Scripted("policy", 2), Scripted("rollout", 2)
    transport = collective(policy, engines)
    met = [("join", 0), ("join", 1)]
    for _ in range(2):
        assert await transport.prepare() == Packing(where="device")
        assert engines.calls == met
    engines.births[1] = 1
    await transport.prepare()
    assert engines.calls == met * 2
    assert policy.calls == [("join", 0)] * 2


@pytest.mark.parametrize(("transport", "make"), [(HostTransport, "next_bucket"), (SharedTransport, "share_bucket")])
async def test_the_next_parcel_is_made_while_engines_apply_one(transport: Any, make: str) -> None:
    """And none after that: two exist at once."""
    made, applied = 0, 0
    waiting: list[int] = []

    def next_one(rank: int) -> tuple[float, Any]:
        nonlocal made
        made += 1
        return 0.0, SharedBucket(made - 1, 64, {}, {})

    def apply(rank: int) -> tuple[float, Any]:
        nonlocal applied
        applied += 1
        asyncio.get_running_loop().call_later(0.01, lambda number: waiting.append(made - number), (applied + 1) // 2)
        return 0.02, None

    header = plan([("weight", torch.float32, (80,))], bucket_bytes=64)
    policy, engines = Scripted("policy", 1, **{make: next_one}), Scripted("rollout", 3, receive_bucket=apply)
    await transport(policy, engines, publish_s=5.0).carry(header, [0, 2])
    assert made == header.num_buckets == 5
    assert engines.calls == [("receive_bucket", rank) for _ in range(5) for rank in (0, 2)]
    assert waiting == [1, 1] * 4 + [0, 0]  # while a parcel is applied, one more is made


@pytest.mark.parametrize(
    ("engines", "ranks"),
    [([["GPU-b"]], (1,)), ([["GPU-c"], ["GPU-a"]], (0, 3)), ([["GPU-a", "GPU-b"], ["GPU-b"]], (0, 1))],
)
async def test_one_rank_packs_on_each_device_with_an_engine(engines: list[list[str]], ranks: tuple[int, ...]) -> None:
    places = ["GPU-a", "GPU-b", "GPU-b", "GPU-c"]
    policy = Scripted("policy", 4, device_id=lambda rank: (0.0, places[rank]))
    rollout = Scripted("rollout", len(engines), device_ids=lambda rank: (0.0, engines[rank]))
    packing = await SharedTransport(policy, rollout, publish_s=5.0).prepare()  # type: ignore[arg-type]
    assert packing == Packing(ranks=ranks, where="shared")


async def test_an_engine_on_a_device_without_a_rank_is_named_before_anything_is_packed() -> None:
    policy = Scripted("policy", 1, device_id=lambda rank: (0.0, "GPU-a"))
    rollout = Scripted("rollout", 2, device_ids=lambda rank: (0.0, [["GPU-a"], ["GPU-z"]][rank]))
    with pytest.raises(TransportBroken, match="no rank of the policy is on the devices GPU-z of engines"):
        await SharedTransport(policy, rollout, publish_s=5.0).prepare()  # type: ignore[arg-type]


async def test_an_engine_that_fails_ends_the_relay() -> None:
    header = plan([("weight", torch.float32, (80,))], bucket_bytes=64)
    policy = Scripted("policy", 1, next_bucket=lambda rank: (0.0, None))
    engines = Scripted("rollout", 1, receive_bucket=lambda rank: (0.0, DIED))
    with pytest.raises(RoleDied):
        await HostTransport(policy, engines, publish_s=5.0).carry(header, [0])  # type: ignore[arg-type]
    assert asyncio.all_tasks() == {asyncio.current_task()}


class Breaking:
    """A transport that never works."""

    name = "collective"

    def __init__(self) -> None:
        self.tried = 0

    async def prepare(self) -> Packing:
        self.tried += 1
        raise TransportBroken("no route")

    async def carry(self, header: WeightHeader, engines: Sequence[int]) -> None:
        raise AssertionError("not prepared")


async def test_a_transport_that_breaks_twice_without_a_culprit_is_given_up_and_no_publish_is_lost() -> None:
    policy = Scripted("policy", 1, begin_publish=lambda rank: (0.0, HEADER))
    versions = iter(range(1, 4))
    engines = Scripted("rollout", 1, finish_update=lambda rank: (0.0, UpdateReport(next(versions), 1, 16, 1, {})))
    told: list[str] = []
    transport, supervisor = Breaking(), AsIs()
    publisher = BucketPublisher(
        policy,  # type: ignore[arg-type]
        engines,  # type: ignore[arg-type]
        weights=PolicyWeights(),
        supervisor=supervisor,  # type: ignore[arg-type]
        bucket_bytes=64,
        publish_s=5.0,
        transport=transport,
        tell=told.append,
    )
    for version in (1, 2, 3):
        assert (await publisher.publish(version)).version == version
    assert transport.tried == len(told) == publisher.num_breaks == 2
    assert "version 1 goes through the host" in told[0]
    assert told[1].endswith("and so do all later ones")


async def test_work_of_a_stopped_driver_does_not_go_on() -> None:
    engines = Scripted("rollout", 1, receive_broadcast=lambda rank: (60.0, None))
    carrying: Awaitable[None] = collective(Scripted("policy", 1), engines).carry(HEADER, [0])
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(carrying, 0.05)
    assert asyncio.all_tasks() == {asyncio.current_task()}
