"""Parts of the GPU tests that run in separate processes: engines, and a trainer that publishes to them on devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
import torch

from actors.engines import vllm_plugin
from actors.engines.vllm_engine import DeviceVllmEngine
from actors.weights.gpu import ChecksummedSource, EngineFanOut, Placement, Rendezvous, open_trainer
from actors.weights.manifest import WeightHeader, plan
from tests.deadlines import scaled
from tests.integration.engine_scenarios import (
    behaviour,
    context,
    perturbed,
    publish,
    read_weights,
    saved_beside,
    start,
)
from tests.numerics.ranks import free_port

CALL_S = scaled(60)
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


class Engine:
    """An actor with one engine that gets its weights from another device."""

    def __init__(self, folder: Path, placement: Placement) -> None:
        self._engine = DeviceVllmEngine(folder, context(**ON_GPU), transfer_backend=vllm_plugin.GPU_BACKENDS[placement])

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._engine, method)(*arguments)

    def logprobs(self) -> list[float]:
        return behaviour(self._engine)[0]


class RemoteEngine:
    """The engine, as seen from the trainer's process."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._call("init_weight_transfer_engine", init_info)

    def start_weight_update(self) -> None:
        self._call("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._call("update_weights", update_info)

    def finish_weight_update(self) -> None:
        self._call("finish_weight_update")

    def _call(self, method: str, *arguments: Any) -> None:
        ray.get(self._actor.call.remote(method, *arguments), timeout=CALL_S)


class Trainer:
    """An actor with the policy's weights on its GPU."""

    def __init__(self, folder: Path, placement: Placement, engines: list[Any]) -> None:
        weights = read_weights(folder)
        header = plan(((name, t.dtype, t.shape) for name, t in weights.items()), bucket_bytes=64 * 1024)
        self._on_host = weights
        self._weights = {name: tensor.cuda() for name, tensor in weights.items()}
        self._source = ChecksummedSource(header, lambda: iter(self._weights.items()))
        client = EngineFanOut([RemoteEngine(engine) for engine in engines], workers_per_engine=1)
        rendezvous = Rendezvous("127.0.0.1", free_port())
        self._transfer = open_trainer(placement, self._source, client, rank=0, rendezvous=rendezvous)

    def publish(self, seed: int, target: Path) -> tuple[WeightHeader, dict[str, str]]:
        """Changes all weights, sends them, and writes a copy of the model to `target`, next to the model's folder."""
        changed = perturbed(self._on_host, list(self._on_host), seed=seed)
        self._weights = {name: tensor.cuda() for name, tensor in changed.items()}
        self._transfer.send_weights()
        saved_beside(target.parent / "model", changed, target)
        return self._source.header, dict(self._source.checksums)


def logprobs_of(folder: Path) -> list[float]:
    return behaviour(start(folder, **ON_GPU))[0]
