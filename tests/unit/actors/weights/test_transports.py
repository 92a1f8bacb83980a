"""Groups and shared memory in one process: their members are threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from inspect import signature
from math import prod
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from actors.weights.manifest import Unpacker, WeightHeader, pack, plan
from actors.weights.sender import follow
from actors.weights.transports import group as groups
from actors.weights.transports.broken import TransportBroken
from actors.weights.transports.group import STOP, BroadcastGroup, Rendezvous
from actors.weights.transports.receiver import Announced, Receiver
from actors.weights.transports.shared import (
    _DEVICE,
    _NO_COUNTER,
    SharedBucket,
    SharedBuffer,
    SharedReader,
    device_id,
    uncounted,
)
from tests.deadlines import scaled

CPU = torch.device("cpu")
SHAPES = {"a": (40, 7), "empty": (0,), "b": (16,), "c": (33, 5), "d": (3,), "last": (0, 4)}


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return {name: torch.arange(1.0, prod(shape) + 1).reshape(shape) for name, shape in SHAPES.items()}


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=scaled(30)), wait_for_workers=False)


def header_of(weights: dict[str, torch.Tensor], bucket_bytes: int = 128) -> WeightHeader:
    return plan(((name, t.dtype, t.shape) for name, t in weights.items()), bucket_bytes)


def meeting(store: TCPStore, world_size: int, limit_s: float = 30.0) -> Rendezvous:
    return Rendezvous("127.0.0.1", store.port, "g", world_size, scaled(limit_s))


def together(*members: Callable[[], Any]) -> list[Any]:
    """The result or the TransportBroken of each."""

    def outcome(member: Callable[[], Any]) -> Any:
        try:
            return member()
        except TransportBroken as error:
            return error

    with ThreadPoolExecutor(len(members)) as pool:
        return list(pool.map(outcome, members))


def sent(store: TCPStore, header: WeightHeader, weights: dict[str, torch.Tensor], rounds: int) -> None:
    group = BroadcastGroup(meeting(store, 3), 0, CPU)
    for _ in range(rounds):
        group.allow()
        for bucket in pack(header, weights.items()):
            group.send(bucket)
        group.flush()


def received(store: TCPStore, header: WeightHeader, rank: int, rounds: int) -> list[list[tuple[str, torch.Tensor]]]:
    receiver = Receiver(CPU, keeps=False)
    receiver.join(meeting(store, 3), rank)
    return [list(_unpacked(receiver, header)) for _ in range(rounds)]


def _unpacked(receiver: Receiver, header: WeightHeader) -> Iterator[tuple[str, torch.Tensor]]:
    receiver.begin(header)
    unpacker = Unpacker(header)
    for _ in range(header.num_buckets):
        yield from unpacker.add(receiver.take(Announced()))
    with pytest.raises(TransportBroken, match="after the last bucket"):
        receiver.take(Announced())


def assert_equal(found: Sequence[tuple[str, torch.Tensor]], weights: dict[str, torch.Tensor]) -> None:
    assert [name for name, _ in found] == list(weights)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in found)


def test_a_broadcast_brings_every_publish_to_every_member(store: TCPStore, weights: dict[str, torch.Tensor]) -> None:
    header = header_of(weights)
    assert header.num_buckets > 5
    _, one, two = together(
        lambda: sent(store, header, weights, 2),
        lambda: received(store, header, 1, 2),
        lambda: received(store, header, 2, 2),
    )
    for found in (*one, *two):
        assert_equal(found, weights)


def test_a_member_that_does_not_come_breaks_the_group_for_all(store: TCPStore) -> None:
    place = Rendezvous("127.0.0.1", store.port, "g", 3, limit_s=0.5)
    outcomes = together(lambda: BroadcastGroup(place, 0, CPU), lambda: BroadcastGroup(place, 1, CPU))
    assert [type(outcome) for outcome in outcomes] == [TransportBroken] * 2
    assert "for the members to meet" in str(outcomes[0])


def test_the_drivers_stop_ends_all_waits(store: TCPStore, weights: dict[str, torch.Tensor]) -> None:
    header = header_of(weights)

    def waits() -> None:
        group = BroadcastGroup(meeting(store, 2), 1, CPU)
        PrefixStore("g", store).set(STOP, "engine 3 is gone")
        list(group.receive(header))

    outcomes = together(lambda: BroadcastGroup(meeting(store, 2), 0, CPU), waits)
    assert "the driver stopped the group: engine 3 is gone" in str(outcomes[1])


def test_a_group_that_was_left_keeps_no_bucket(store: TCPStore, weights: dict[str, torch.Tensor]) -> None:
    header = header_of(weights)

    def leaves() -> list[tuple[Any, torch.Tensor]]:
        group = BroadcastGroup(meeting(store, 2), 0, CPU)
        group.send(next(pack(header, weights.items())))  # the other member never receives it
        in_flight = group._in_flight
        assert in_flight
        group.leave()
        for thread in threading.enumerate():
            if thread.name == "leave-group":
                thread.join(scaled(30))
        assert group._backend in groups._LEFT
        assert not group._in_flight
        return in_flight

    in_flight, _ = together(leaves, lambda: BroadcastGroup(meeting(store, 2), 1, CPU))
    assert in_flight == []


def test_a_worker_without_a_group_says_so() -> None:
    with pytest.raises(TransportBroken, match="in no group"):
        Receiver(CPU, keeps=False).take(Announced())


@pytest.mark.parametrize("bucket_bytes", [64, 128, 192, 1024, 1 << 20])
def test_ranks_that_only_follow_take_as_many_tensors_per_bucket_as_those_that_pack(
    weights: dict[str, torch.Tensor], bucket_bytes: int
) -> None:
    header = header_of(weights, bucket_bytes)

    def taken(buckets: Callable[..., Iterator[Any]]) -> list[int]:
        count = 0

        def counted() -> Iterator[tuple[str, torch.Tensor]]:
            nonlocal count
            for pair in weights.items():
                count += 1
                yield pair

        return [count for _ in buckets(header, counted())]

    assert taken(follow) == taken(pack)


@pytest.mark.parametrize("bucket_bytes", [64, 128, 1 << 20])
def test_both_sides_know_which_tensors_end_in_a_bucket(weights: dict[str, torch.Tensor], bucket_bytes: int) -> None:
    header = header_of(weights, bucket_bytes)
    buckets = list(pack(header, weights.items()))
    assert header.endings() == [list(bucket.digests) for bucket in buckets]


def test_a_shared_bucket_is_a_copy_of_what_the_policy_put_there(weights: dict[str, torch.Tensor]) -> None:
    header = header_of(weights, 1024)
    buffer, reader, unpacker = SharedBuffer(1024, CPU), SharedReader(CPU, copies=True), Unpacker(header)
    found, parcels = [], []
    for bucket in pack(header, weights.items(), lambda _: buffer.memory):
        parcels.append(SharedBucket(bucket.index, bucket.num_bytes, bucket.digests, {device_id(CPU): buffer.handle}))
        found += unpacker.add(reader.take(parcels[-1]))
    buffer.memory.zero_()
    assert_equal(found, weights)
    reader.close()
    buffer.close()
    with pytest.raises(TransportBroken, match="can't be mapped"):
        reader.take(parcels[0])


def test_a_bucket_that_is_applied_at_once_is_read_where_the_policy_put_it(weights: dict[str, torch.Tensor]) -> None:
    (bucket,) = pack(header_of(weights, 4096), weights.items())
    buffer, reader = SharedBuffer(4096, CPU), SharedReader(CPU, copies=False)
    taken = reader.take(SharedBucket(0, bucket.num_bytes, bucket.digests, {device_id(CPU): buffer.handle}))
    buffer.memory[: bucket.num_bytes].copy_(bucket.tensor)
    assert torch.equal(taken.tensor, bucket.tensor)
    reader.close()
    buffer.close()


def test_a_handle_of_a_gpus_memory_counts_no_mapping_and_its_counter_is_kept_for_the_end() -> None:
    """By their places among torch's arguments, of which CPUs have no example."""
    names = list(signature(rebuild_cuda_tensor).parameters)
    handle, counter = uncounted(names)
    assert counter == ("ref_counter_handle", "ref_counter_offset")
    assert names[_DEVICE] == "storage_device"
    assert [new for new, old in zip(handle, names, strict=True) if new != old] == [_NO_COUNTER]


def test_an_engine_on_another_device_can_not_read_a_shared_bucket() -> None:
    with pytest.raises(TransportBroken, match="no rank of the policy is on the device"):
        SharedReader(CPU, copies=True).take(SharedBucket(0, 64, {}, {"GPU-1": None}))
