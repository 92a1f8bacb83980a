"""Parts of the GPU tests that run in separate processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from actors.machine.devices import compute_device
from actors.weights.transports.shared import SharedBucket, SharedReader
from orchestrator.types import ShardRequest
from tests.integration.engine_scenarios import (
    behaviour,
    perturbed,
    publish,
    read_weights,
    saved_beside,
    start,
)

SHARE_OF_GPU = 0.15  # share of GPU memory of each engine of a test
ON_GPU = {"dtype": "bfloat16", "gpu_memory_utilization": SHARE_OF_GPU}


def buckets_and_a_fresh_engine(folder: Path) -> tuple[int, list[float], list[float], list[float]]:
    """Publishes through the host, as the loop does. (tensors compared, log-probs before, after, of a fresh engine)"""
    engine = start(folder, **ON_GPU)
    before, _ = behaviour(engine)
    weights = read_weights(folder)
    changed = perturbed(weights, list(weights), seed=1)
    compared = publish(engine, changed, 1).num_compared
    after, _ = behaviour(engine)
    fresh, _ = behaviour(start(saved_beside(folder, changed, folder.parent / "fresh"), **ON_GPU))
    return compared, before, after, fresh


def asleep_and_awake(folder: Path) -> tuple[int, bool, int]:
    """(bytes freed by sleeping, whether the engine behaves as before, tensors compared by the next publish)"""
    engine = start(folder, sleeps=True, **ON_GPU)
    before = behaviour(engine)
    free, _ = torch.cuda.mem_get_info()
    engine.sleep(1)
    freed = torch.cuda.mem_get_info()[0] - free
    engine.wake(("weights", "kv_cache"))
    same = behaviour(engine) == before
    return freed, same, publish(engine, read_weights(folder), 1).num_compared


def logprobs_of(folder: Path) -> list[float]:
    return behaviour(start(folder, **ON_GPU))[0]


def mapped(parcel: SharedBucket) -> int:
    """The sum of a shared bucket's bytes, whose memory this process maps and lets go of."""
    reader = SharedReader(compute_device(), copies=True)
    total = int(reader.take(parcel).tensor.sum())
    reader.close()
    return total


def sampled(folder: Path, requests: Sequence[ShardRequest]) -> list[list[dict[str, Any]]]:
    """The rows of each request, from one engine."""
    engine = start(folder, **ON_GPU)
    assert engine._llm.llm_engine.vllm_config.use_v2_model_runner, "docs/gpu.md names another model runner"
    return [engine.generate(request)[0].to_pylist() for request in requests]
