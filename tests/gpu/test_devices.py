"""What an actor sees of the GPUs that Ray gives it, and what `check --cluster` says of this machine."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch

from actors.engines.contract import EngineContext
from actors.engines.hf_engine import HfEngine
from actors.groups.cluster import alive_nodes, environment
from actors.groups.group_probe import probe_group
from actors.groups.probes import Findings, probe_nodes
from actors.groups.starter import placed
from actors.machine.devices import compute_device, driver_cuda, installed_build, visible_devices, why_not_this
from jobs.check.nodes import problems_of
from orchestrator.config.sections import ModelConfig
from orchestrator.planning.placement import Demand
from tests.deadlines import scaled
from tests.local_ray import local_ray
from tests.tiny import tiny_llama

CALL_S = scaled(120)
NUM_GPUS = torch.cuda.device_count()


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    with local_ray("gp", num_cpus=8) as address:
        yield address


def test_the_driver_runs_what_torch_is_built_for() -> None:
    build, cuda = installed_build(), driver_cuda()
    assert build.cuda is not None and cuda is not None
    assert cuda[0] >= build.cuda[0]
    assert build.kernels


def test_every_device_has_code_and_free_memory() -> None:
    found = visible_devices()
    assert len(found) == NUM_GPUS
    for device in found:
        assert why_not_this(device, installed_build()) is None
        assert 0 < device.free_bytes <= device.total_bytes


def test_a_product_on_the_device_is_that_of_the_host() -> None:
    left, right = torch.randn(256, 256), torch.randn(256, 256)
    product = (left.to(compute_device()) @ right.to(compute_device())).cpu()
    assert compute_device().type == "cuda"
    assert torch.allclose(product, left @ right, atol=1e-2)


def test_an_actor_sees_the_gpu_that_it_was_given_and_no_other(cluster: str) -> None:
    def seen() -> tuple[str, int]:
        return os.environ["CUDA_VISIBLE_DEVICES"], torch.cuda.device_count()

    env = {"env_vars": environment(1, on_gpu=True)}
    calls = [ray.remote(seen).options(num_gpus=1, runtime_env=env).remote() for _ in range(NUM_GPUS)]
    assert all(count == 1 for _, count in ray.get(calls, timeout=CALL_S))


def test_an_actor_without_a_gpu_computes_on_the_cpu(cluster: str) -> None:
    env = {"env_vars": {**environment(1, on_gpu=False), "CUDA_VISIBLE_DEVICES": ""}}
    device = ray.get(ray.remote(compute_device).options(runtime_env=env).remote(), timeout=CALL_S)
    assert device == torch.device("cpu")


def test_the_probes_find_this_machine_healthy(cluster: str) -> None:
    found: Findings = asyncio.run(probe_nodes(alive_nodes()))
    assert list(problems_of(found, alive_nodes())) == []
    ((_, facts),) = found.facts.items()
    assert len(facts.devices) == NUM_GPUS


def test_a_group_on_all_gpus_reduces_over_nccl(cluster: str) -> None:
    if NUM_GPUS < 2:
        pytest.skip("a group needs two GPUs, and here is one")

    async def reduced() -> float:
        demands = [Demand("policy", NUM_GPUS, 1.0, 1.0)]
        async with placed(demands, mode="separate", wait_s=30, collective_s=60, tell=lambda _: None) as starter:
            return await probe_group(starter, "policy")

    assert asyncio.run(reduced()) < CALL_S


def test_an_engine_of_transformers_computes_on_the_device(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    model = ModelConfig(path=str(folder), dtype="bfloat16", max_length=64)
    engine = HfEngine(folder, EngineContext(model=model, threads=1, max_samples=4))
    assert next(engine._model.parameters()).device.type == "cuda"
    assert len(engine.prompt_logprobs([[1, 2, 3]])[0]) == 2
