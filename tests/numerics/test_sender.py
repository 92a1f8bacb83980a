"""A rank of the policy packs straight into the memory that engines map, and holds no more than that."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from actors.weights.manifest import Unpacker, WeightHeader
from actors.weights.sender import Packing, PublishingPolicy
from actors.weights.transports.broken import TransportBroken
from actors.weights.transports.shared import SharedBucket, SharedReader
from orchestrator.algorithms.grpo import Grpo
from orchestrator.config.sections import PolicyConfig
from tests.numerics.ranks import context, group
from tests.tiny import tiny_llama

CPU = torch.device("cpu")
SHARED = Packing(where="shared")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> PublishingPolicy:
    folder = tiny_llama(tmp_path_factory.mktemp("model"))
    return PublishingPolicy(PolicyConfig(), context(folder, Grpo(), dtype="float32"), group())


def parcel_of(policy: PublishingPolicy) -> SharedBucket:
    parcel = policy.share_bucket()
    assert parcel is not None
    return parcel


def received(policy: PublishingPolicy, header: WeightHeader, reader: SharedReader) -> dict[str, torch.Tensor]:
    unpacker = Unpacker(header)
    return {
        name: tensor for _ in range(header.num_buckets) for name, tensor in unpacker.add(reader.take(parcel_of(policy)))
    }


def test_a_publish_that_fails_before_it_is_mapped_leaves_its_memory_to_the_next(policy: PublishingPolicy) -> None:
    header = policy.begin_publish(1 << 10, SHARED)
    assert header.num_buckets > 2
    failed = [parcel_of(policy) for _ in range(2)]
    handles = [parcel.handles for parcel in failed]
    assert handles[0] != handles[1]
    assert policy.begin_publish(1 << 10, SHARED) == header
    memory = [buffer.memory.data_ptr() for buffer in policy._shared]
    reader = SharedReader(CPU, copies=True)
    found = received(policy, header, reader)
    assert [parcel.handles for parcel in failed] == handles
    assert {handle for parcel in failed for handle in parcel.handles.values()} == set(reader._mapped)
    assert [buffer.memory.data_ptr() for buffer in policy._shared] == memory
    expected = dict(policy.full_weights())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    reader.close()
    policy.end_publish()
    with pytest.raises(TransportBroken, match="can't be mapped"):
        SharedReader(CPU, copies=True).take(failed[0])


def test_a_bucket_lies_in_the_shared_memory_itself(policy: PublishingPolicy) -> None:
    header = policy.begin_publish(1 << 10, SHARED)
    memory = [buffer.memory for buffer in policy._shared]
    for index in range(header.num_buckets):
        bucket = policy.next_bucket()
        assert bucket is not None
        assert bucket.tensor.data_ptr() == memory[index % 2].data_ptr()
    policy.end_publish()


def test_a_tensor_is_released_before_the_next_is_gathered(
    policy: PublishingPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, held = policy.learner, list[weakref.ref[Any]]()
    gathered = learner._gathered

    def watching(tensors: Sequence[torch.Tensor]) -> Any:
        assert not any(each() is not None for each in held)
        return gathered(tensors)

    monkeypatch.setattr(learner, "_gathered", watching)
    for _, tensor in learner.full_weights():
        held.append(weakref.ref(tensor))
        del tensor
    assert len(held) > 2
