from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from actors.weights.manifest import Bucket, Room, Unpacker, WeightHeader, pack, plan
from orchestrator.errors import PublishError

BUCKET = 256


def _weights(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed": (40, 8), "norm": (8,), "scale": (), "empty": (0, 3), "up": (33, 7), "down": (1, 64)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def _header(weights: dict[str, torch.Tensor], bucket_bytes: int = BUCKET) -> WeightHeader:
    return plan(((name, t.dtype, t.shape) for name, t in weights.items()), bucket_bytes)


def _unpack(header: WeightHeader, buckets: Iterator[Bucket] | list[Bucket]) -> dict[str, torch.Tensor]:
    unpacker = Unpacker(header)
    received = {name: tensor for bucket in buckets for name, tensor in unpacker.add(bucket)}
    assert unpacker.done
    return received


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bucket_bytes", [64, BUCKET, 1 << 20])
def test_what_is_packed_is_what_is_unpacked(dtype: torch.dtype, bucket_bytes: int) -> None:
    weights = _weights(dtype)
    header = _header(weights, bucket_bytes)
    buckets = list(pack(header, weights.items()))
    assert len(buckets) == header.num_buckets
    assert all(bucket.data.nbytes <= bucket_bytes for bucket in buckets)
    received = _unpack(header, buckets)
    assert list(received) == list(weights)
    for name, tensor in weights.items():
        assert received[name].dtype == dtype
        assert received[name].shape == tensor.shape
        assert torch.equal(received[name], tensor), name


@pytest.mark.parametrize("bucket_bytes", [64, BUCKET])
def test_packing_holds_one_bucket_and_one_tensor(bucket_bytes: int) -> None:
    weights, held = _weights(torch.bfloat16), list[weakref.ref[Any]]()
    header = _header(weights, bucket_bytes)

    def remembered(tensor: torch.Tensor) -> torch.Tensor:
        assert not any(each() is not None for each in held), "what came before is still held"
        held.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    def buckets(tensors: Iterator[tuple[str, torch.Tensor]], room: Room) -> int:
        count = 0
        for bucket in pack(header, tensors, room):
            count += 1
            del bucket
        return count

    def new(index: int) -> torch.Tensor:
        return torch.empty(header.bucket_size(index) + 64, dtype=torch.uint8)

    assert buckets(iter(weights.items()), lambda index: remembered(new(index))) == header.num_buckets > 1
    assert len(held) == header.num_buckets
    held.clear()
    copies = ((name, remembered(tensor.clone())) for name, tensor in weights.items())
    assert buckets(copies, new) == header.num_buckets
    assert len(held) == len(weights)


def test_fp32_masters_are_cast_to_the_planned_dtype() -> None:
    masters = _weights(torch.float32)
    header = _header(_weights(torch.bfloat16))
    received = _unpack(header, list(pack(header, masters.items())))
    assert all(torch.equal(received[name], tensor.to(torch.bfloat16)) for name, tensor in masters.items())


def test_read_only_buckets_are_accepted_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    weights = _weights(torch.float32)
    header = _header(weights)
    buckets = list(pack(header, weights.items()))
    for bucket in buckets:
        bucket.data.flags.writeable = False
    _unpack(header, buckets)
    assert not recwarn.list


@pytest.mark.parametrize("name", ["embed", "norm", "scale", "up", "down"])
def test_one_bit_altered_in_transit_names_the_tensor(name: str) -> None:
    weights = _weights(torch.bfloat16)
    header = _header(weights)
    buckets = list(pack(header, weights.items()))
    position = header.start(list(weights).index(name)) + weights[name].nbytes - 1
    buckets[position // BUCKET].data[position % BUCKET] ^= np.uint8(1)
    with pytest.raises(PublishError, match=f"for {name};"):
        _unpack(header, buckets)


def test_a_tensor_that_is_proved_later_is_not_compared_when_it_arrives() -> None:
    weights = _weights(torch.bfloat16)
    header = _header(weights)
    buckets = list(pack(header, weights.items()))
    buckets[0].data[0] ^= np.uint8(1)
    unpacker = Unpacker(header, proved_later=lambda spec: spec.name == "embed")
    received = {name: tensor for bucket in buckets for name, tensor in unpacker.add(bucket)}
    assert not torch.equal(received.pop("embed"), weights.pop("embed"))
    assert all(torch.equal(received[name], tensor) for name, tensor in weights.items())


def test_a_tensor_in_several_buckets_arrives_in_the_room_that_is_given() -> None:
    weights = _weights(torch.bfloat16)
    header = _header(weights)
    rooms = {name: torch.zeros(tensor.nbytes, dtype=torch.uint8) for name, tensor in weights.items()}
    unpacker = Unpacker(header, room=lambda spec: rooms[spec.name])
    received = {name: tensor for bucket in pack(header, weights.items()) for name, tensor in unpacker.add(bucket)}
    assert all(torch.equal(received[name], tensor) for name, tensor in weights.items())
    arrived = {name for name, room in rooms.items() if room.numel() and received[name].data_ptr() == room.data_ptr()}
    assert arrived == {"embed", "up"}
    assert all(not room.any() for name, room in rooms.items() if name not in arrived)


def test_a_tensor_that_is_proved_later_still_needs_the_trainers_digest() -> None:
    weights = _weights(torch.bfloat16)
    header = _header(weights, bucket_bytes=1 << 20)
    (bucket,) = pack(header, weights.items())
    without = {name: value for name, value in bucket.digests.items() if name != "norm"}
    with pytest.raises(PublishError, match="for norm;"):
        Unpacker(header, proved_later=lambda _: True).add(Bucket(0, bucket.data, without))


def test_a_dropped_or_repeated_bucket_is_refused() -> None:
    weights = _weights(torch.bfloat16)
    header = _header(weights)
    buckets = list(pack(header, weights.items()))
    with pytest.raises(PublishError, match="expected bucket 1 of"):
        _unpack(header, [buckets[0], buckets[2]])
    with pytest.raises(PublishError, match="expected bucket 1 of"):
        _unpack(header, [buckets[0], buckets[0]])


def test_a_trainer_that_disagrees_with_its_plan_is_refused() -> None:
    weights = _weights(torch.bfloat16)
    header = _header(weights)
    without_up = {name: tensor for name, tensor in weights.items() if name != "up"}
    with pytest.raises(PublishError, match="'down'.*where the header announces 'up'"):
        list(pack(header, without_up.items()))
    with pytest.raises(PublishError, match="no 'down'"):
        list(pack(header, list(weights.items())[:-1]))
    with pytest.raises(PublishError, match="'more' after"):
        list(pack(header, [*weights.items(), ("more", torch.zeros(1))]))
    with pytest.raises(PublishError, match="distinct"):
        plan([("a", torch.float32, (1,)), ("a", torch.float32, (1,))], BUCKET)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_and_subnormals_travel_as_plus_zero(dtype: torch.dtype) -> None:
    smallest = torch.finfo(dtype).tiny
    weights = {
        "odd": torch.tensor([-0.0, smallest, -smallest, smallest / 2, -torch.inf, torch.nan, 1.0] * 20).to(dtype)
    }
    received = _unpack(_header(weights, 64), pack(_header(weights, 64), weights.items()))["odd"]
    expected = torch.tensor([0.0, smallest, -smallest, 0.0, -torch.inf, torch.nan, 1.0] * 20).to(dtype)
    assert torch.equal(received.view(torch.uint8), expected.view(torch.uint8))
