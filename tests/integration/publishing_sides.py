"""A policy and engines as actors, without the rest of a run, and the publisher between them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actors.engines.contract import EngineContext
from actors.groups.cluster import environment
from actors.groups.group import ActorGroup
from actors.groups.process import as_actor
from actors.learning.distributed import Group
from actors.remote.publisher import BucketPublisher, PolicyWeights
from actors.remote.transports import Transport
from benchmarks.publish import AsIs
from orchestrator.algorithms.grpo import Grpo
from orchestrator.config.base import Dtype
from orchestrator.config.sections import ModelConfig, PolicyConfig, RolloutConfig
from orchestrator.errors import PublishError
from tests.deadlines import scaled
from tests.integration.altering_engine import AlteringRollout
from tests.integration.altering_policy import AlteringPolicy
from tests.numerics.ranks import context, free_port

CALL_S = scaled(60.0)
START_S = scaled(240.0)
BUCKET_BYTES = 1 << 20


class Sides:
    """Needs a Ray that this process is connected to.

    Args:
        ranks, engines: numbers of actors.
        gpus: of each actor.
        learning_rate: of the policy.
        sleeps: whether engines give their memory back in turns.
    """

    def __init__(
        self,
        model: Path,
        *,
        ranks: int,
        engines: int,
        zero_stage: int,
        dtype: Dtype = "float32",
        gpus: float = 0.0,
        learning_rate: float = 5e-6,
        sleeps: bool = False,
        **rollout: Any,
    ) -> None:
        variables = {"env_vars": environment(1, on_gpu=gpus > 0)}
        options = {"num_cpus": 0, "num_gpus": gpus, "runtime_env": variables}
        section = PolicyConfig(ranks=ranks, zero_stage=zero_stage, learning_rate=learning_rate)
        self.sleeps = sleeps
        policy = {"policy": section, "context": context(model, Grpo(), dtype=dtype)}
        port = free_port()
        members = [Group(rank, ranks, master_port=port) for rank in range(ranks)]
        learners = [as_actor(AlteringPolicy).options(**options).remote(group=member, **policy) for member in members]
        of_engine = EngineContext(
            model=ModelConfig(path=str(model), max_length=128, dtype=dtype),
            threads=1,
            max_samples=8,
            rollout=RolloutConfig(engine="vllm", kv_cache_gib=0.1, **rollout),
            version=None,
            sleeps=sleeps,
        )
        samplers = [
            as_actor(AlteringRollout).options(**options).remote(context=of_engine, cache=model) for _ in range(engines)
        ]
        self.policy, self.engines = ActorGroup("policy", learners), ActorGroup("rollout", samplers)

    async def __aenter__(self) -> Sides:
        await asyncio.gather(self.policy.await_ready(START_S), self.engines.await_ready(START_S))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.policy.kill()
        self.engines.kill()

    def over(self, transport: Callable[..., Transport]) -> BucketPublisher:
        supervisor: Any = AsIs()
        return BucketPublisher(
            self.policy,
            self.engines,
            weights=PolicyWeights(),
            supervisor=supervisor,
            bucket_bytes=BUCKET_BYTES,
            publish_s=CALL_S,
            transport=transport(self.policy, self.engines, publish_s=CALL_S),
        )


async def one_digest_and_altered_tensors_are_named(sides: Sides, publisher: BucketPublisher, name: str) -> None:
    """Of partitions of the policy, of the layers of engines and of what is sent; and of what is altered on its way."""
    report = await publisher.publish(1)
    sums = (await sides.policy.call_all(AlteringPolicy.sums, CALL_S))[-1]
    assert report.num_tensors == len(sums)
    for held in await sides.engines.call_all(AlteringRollout.digests, CALL_S):
        assert held == sums
    last = len(sides.engines) - 1
    await sides.engines.call(last, AlteringRollout.alter, CALL_S, name)
    with pytest.raises(PublishError, match=name):
        await publisher.publish(2)
    await sides.engines.call(last, AlteringRollout.alter, CALL_S, None)
    await sides.policy.call_all(AlteringPolicy.alter, CALL_S, name)
    with pytest.raises(PublishError, match=f"{name} was gathered from the policy's ranks with other bytes"):
        await publisher.publish(2)
    await sides.policy.call_all(AlteringPolicy.alter, CALL_S, None)
    assert (await publisher.publish(3)).version == 3
    assert publisher.num_breaks == 0
