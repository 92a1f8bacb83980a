"""Publishes weights to engines on GPUs: through the host, by CUDA IPC on a shared GPU, by NCCL between two GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from actors.machine.devices import compute_device
from actors.remote.transports import CollectiveTransport, SharedTransport, Transport
from actors.weights.transports.shared import SharedBucket, SharedBuffer, device_id
from orchestrator.errors import PublishError
from tests.gpu import scenarios
from tests.integration.altering_engine import AlteringRollout
from tests.integration.altering_policy import AlteringPolicy
from tests.integration.colocated_steps import LEARNING_RATE, require_learning, steps_in_turns
from tests.integration.engine_scenarios import served_llama
from tests.integration.publishing_sides import CALL_S, Sides, one_digest_and_altered_tensors_are_named

Apart = Callable[..., Any]
CLOSE = 0.02  # tolerance of log-probs in bf16: two engines may batch differently


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return served_llama(tmp_path / "model", tied=True, dtype=torch.bfloat16)


@pytest.fixture
def local_ray() -> Iterator[None]:
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_an_engine_on_a_gpu_takes_buckets_from_the_host_and_proves_them(apart: Apart, folder: Path) -> None:
    compared, before, after, fresh = apart(scenarios.buckets_and_a_fresh_engine, folder)
    assert compared > 0
    assert after == pytest.approx(fresh, abs=CLOSE)
    assert after != pytest.approx(before, abs=CLOSE)


def test_an_engine_gives_its_memory_back_while_it_sleeps_and_wakes_as_it_was(apart: Apart, folder: Path) -> None:
    freed, same, compared = apart(scenarios.asleep_and_awake, folder)
    total = torch.cuda.get_device_properties(0).total_memory
    assert freed > 0.5 * scenarios.SHARE_OF_GPU * total
    assert same
    assert compared > 0


@pytest.mark.parametrize("times", [0, 1, 2])
def test_shared_memory_is_free_at_its_end_however_often_it_was_mapped(apart: Apart, times: int) -> None:
    device = compute_device()
    before = torch.cuda.memory_allocated()
    buffer = SharedBuffer(1 << 20, device)
    buffer.memory.fill_(1)
    buffer.settle()
    parcel = SharedBucket(0, 1 << 20, {}, {device_id(device): buffer.handle})
    assert [apart(scenarios.mapped, parcel) for _ in range(times)] == [1 << 20] * times
    assert torch.cuda.memory_allocated() > before
    buffer.close()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("transport", [SharedTransport, CollectiveTransport])
async def test_weights_that_go_from_device_to_device_are_proved(
    local_ray: None, apart: Apart, folder: Path, transport: Callable[..., Transport]
) -> None:
    shared = transport is SharedTransport
    if not shared and torch.cuda.device_count() < 2:
        pytest.skip("NCCL needs a GPU for each side, and here is one")
    gpus = 0.4 if shared else 1.0
    async with Sides(folder, ranks=1, engines=1, zero_stage=0, gpus=gpus, **scenarios.ON_GPU) as sides:
        publisher = sides.over(transport)
        before = None
        for version in (1, 2):
            report = await publisher.publish(version)
            assert (report.version, report.num_bytes > 0) == (version, True)
            assert publisher.num_breaks == 0, "the weights took the way through the host"
            target = folder.parent / f"published-{version}"
            await sides.policy.call(0, AlteringPolicy.export, CALL_S, target)
            (after,) = await sides.engines.call_all(AlteringRollout.logprobs, CALL_S)
            assert after == pytest.approx(apart(scenarios.logprobs_of, target), abs=CLOSE)
            assert after != pytest.approx(before, abs=CLOSE)
            before = after
            await sides.policy.call_all(AlteringPolicy.perturb, CALL_S, version)


async def test_an_engine_and_a_learner_take_turns_on_one_gpu(local_ray: None, folder: Path) -> None:
    async with Sides(
        folder,
        ranks=1,
        engines=1,
        zero_stage=1,
        gpus=0.4,
        learning_rate=LEARNING_RATE,
        sleeps=True,
        **scenarios.ON_GPU,
    ) as sides:
        publisher = sides.over(SharedTransport)
        steps = await steps_in_turns(sides, publisher)
        assert publisher.num_breaks == 0, "the weights took the way through the host"
    require_learning(steps, tolerance=CLOSE)


@pytest.mark.parametrize("engines", [1, 2])
async def test_partitions_are_broadcast_with_one_digest_and_an_altered_tensor_is_named(
    local_ray: None, folder: Path, engines: int
) -> None:
    if torch.cuda.device_count() < 2 + engines:
        pytest.skip(f"two ranks and {engines} engines need a GPU each, and here are {torch.cuda.device_count()}")
    async with Sides(folder, ranks=2, engines=engines, zero_stage=3, gpus=1.0, **scenarios.ON_GPU) as sides:
        publisher = sides.over(CollectiveTransport)
        await one_digest_and_altered_tensors_are_named(sides, publisher, "model.norm.weight")


async def test_an_engine_that_received_other_bytes_names_the_tensor_and_serves_nothing(
    local_ray: None, folder: Path
) -> None:
    async with Sides(folder, ranks=1, engines=1, zero_stage=0, gpus=0.4, **scenarios.ON_GPU) as sides:
        publisher = sides.over(SharedTransport)
        norm = "model.norm.weight"
        await sides.engines.call(0, AlteringRollout.alter, CALL_S, norm)
        with pytest.raises(PublishError, match=norm):
            await publisher.publish(1)
        with pytest.raises(PublishError, match="serves no published version"):
            await sides.engines.call(0, AlteringRollout.logprobs, CALL_S)
