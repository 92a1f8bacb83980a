"""Publishes weights to engines on GPUs: through the host, by CUDA IPC on a shared GPU, by NCCL between two GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from actors.weights.gpu import Placement

from orchestrator.errors import PublishError
from tests.deadlines import scaled
from tests.gpu import scenarios
from tests.integration.engine_scenarios import served_llama

Apart = Callable[..., Any]
CLOSE = 0.02  # tolerance of log-probs in bf16: two engines may batch differently
START_S = scaled(240)


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


@pytest.mark.parametrize("placement", ["colocated", "separate"])
def test_weights_that_go_from_device_to_device_are_proved(
    local_ray: None, apart: Apart, folder: Path, placement: Placement
) -> None:
    if placement == "separate" and torch.cuda.device_count() < 2:
        pytest.skip("NCCL needs a GPU for each side, and here is one")
    share = 0.4 if placement == "colocated" else 1.0
    engine = ray.remote(scenarios.Engine).options(num_gpus=share).remote(folder, placement)
    before = ray.get(engine.logprobs.remote(), timeout=START_S)
    trainer = ray.remote(scenarios.Trainer).options(num_gpus=share).remote(folder, placement, [engine])
    for version in (1, 2):
        target = folder.parent / f"published-{version}"
        header, checksums = ray.get(trainer.publish.remote(version, target), timeout=START_S)
        report = ray.get(engine.call.remote("confirm_update", version, header, checksums), timeout=START_S)
        assert (report.version, report.num_compared) == (version, len(header.tensors))
        after = ray.get(engine.logprobs.remote(), timeout=START_S)
        assert after == pytest.approx(apart(scenarios.logprobs_of, target), abs=CLOSE)
        assert after != pytest.approx(before, abs=CLOSE)
        before = after


def test_an_engine_that_holds_other_weights_than_the_trainers_is_named_and_serves_nothing(
    local_ray: None, folder: Path
) -> None:
    engine = ray.remote(scenarios.Engine).options(num_gpus=0.4).remote(folder, "colocated")
    trainer = ray.remote(scenarios.Trainer).options(num_gpus=0.4).remote(folder, "colocated", [engine])
    header, checksums = ray.get(trainer.publish.remote(1, folder.parent / "published"), timeout=START_S)
    norm = "model.norm.weight"
    with pytest.raises(PublishError, match=norm):
        ray.get(engine.call.remote("confirm_update", 1, header, {**checksums, norm: "0" * 32}), timeout=START_S)
    with pytest.raises(PublishError, match="serves no published version"):
        ray.get(engine.logprobs.remote(), timeout=START_S)
