"""The rollout role: an actor that builds one engine of the configured kind and forwards all calls to it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from actors.engines.contract import Engine, EngineContext, UpdateReport
from actors.environments.episodes import playing
from actors.models.model import resolve_model
from actors.weights.manifest import WeightHeader
from actors.weights.transports.group import Rendezvous
from actors.weights.transports.receiver import Announced, Parcel
from orchestrator.roles import Tag
from orchestrator.types import ShardRequest

# Names, not classes: an engine's module imports its library, which only the engine's process needs.
ENGINES: Mapping[str, str] = {
    "vllm": "actors.engines.vllm_engine:VllmEngine",
    "hf": "actors.engines.hf_engine:HfEngine",
}


class RolloutWorker:
    """Serves one engine, and plays episodes on it if the context names an environment.

    Raises:
        ConfigError, DataError: the environment or the model's chat template; see actors.environments.episodes.
    """

    def __init__(self, context: EngineContext, cache: Path) -> None:
        module, _, name = ENGINES[context.rollout.engine_kind].partition(":")
        engine = getattr(importlib.import_module(module), name)
        folder = resolve_model(context.model.path, cache)
        self._engine: Engine = engine(folder, context)
        self._sampler = playing(self._engine, folder, context) if context.environment.name else self._engine

    def generate(self, request: ShardRequest) -> tuple[pa.Table, dict[str, Any]]:
        return self._sampler.generate(request)

    def begin_update(self, header: WeightHeader) -> None:
        self._engine.begin_update(header)

    def device_ids(self) -> list[str]:
        return self._engine.device_ids()

    def join(self, meeting: Rendezvous, first_rank: int) -> None:
        self._engine.join(meeting, first_rank)

    def receive_bucket(self, parcel: Parcel) -> None:
        self._engine.receive_bucket(parcel)

    def receive_broadcast(self, num_buckets: int) -> None:
        """All buckets of one publish, from the group."""
        for _ in range(num_buckets):
            self._engine.receive_bucket(Announced())

    def finish_update(self, version: int) -> UpdateReport:
        return self._engine.finish_update(version)

    def sleep(self, level: int) -> None:
        self._engine.sleep(level)

    def wake(self, tags: Sequence[Tag]) -> None:
        self._engine.wake(tags)
