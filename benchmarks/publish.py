"""`python -m benchmarks.publish [--engines N] [--rounds N]`: publishing against copying the same bytes once.

The policy and 1 to N engines are actors of a local Ray, as in the loop, all with SmolLM2-135M. The reference is bytes ÷
copy bandwidth, measured next to each publish: a copy into allocated memory, on all cores.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any, TypeVar

import ray
import torch

from actors.engines.contract import EngineContext
from actors.groups.cluster import environment
from actors.groups.group import ActorGroup
from actors.groups.process import as_actor
from actors.learning.distributed import Group
from actors.remote.publisher import BucketPublisher, PolicyWeights
from actors.remote.transports import SharedTransport
from actors.roles.rollout import RolloutWorker
from actors.weights.sender import PublishingPolicy
from benchmarks.harness import Figure, Pairs, ratio_figure
from benchmarks.table import report
from benchmarks.work import Work, load_work
from jobs.stages.settings import rank_context

T = TypeVar("T")

TARGET = 10.0
COPIES = 20
START_S = 240.0
KV_CACHE_GIB = 0.1
MOST_ENGINES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", type=int, default=MOST_ENGINES, help="measure 1 to this many")
    parser.add_argument("--rounds", type=int, default=8)
    arguments = parser.parse_args()
    with _ray():
        report("publish", asyncio.run(measure(load_work("quickstart"), arguments.engines, arguments.rounds)))


async def measure(work: Work, engines: int, rounds: int) -> list[Figure]:
    policy, rollout = _policy(work), _engines(work, engines)
    await asyncio.gather(policy.await_ready(START_S), rollout.await_ready(START_S))
    figures: list[Figure] = []
    for count in range(1, engines + 1):
        figures += await _measure_count(policy, ActorGroup("rollout", rollout.actors[:count]), work, rounds)
    return figures


async def _measure_count(policy: ActorGroup, engines: ActorGroup, work: Work, rounds: int) -> list[Figure]:
    supervisor: Any = AsIs()
    publisher = BucketPublisher(
        policy,
        engines,
        weights=PolicyWeights(),
        supervisor=supervisor,
        bucket_bytes=work.config.publish.bucket_mib << 20,
        publish_s=work.config.deadlines.publish_s,
        transport=SharedTransport(policy, engines, publish_s=work.config.deadlines.publish_s),  # as on one host
    )
    num_bytes = (await publisher.publish(1)).num_bytes
    publish_s, apply_s, verify_s, copy_s = [], [], [], []
    for number in range(rounds):
        for is_publish in (number % 2 == 0, number % 2 == 1):
            if is_publish:
                published = await publisher.publish(number + 2)
                publish_s.append(published.seconds)
                apply_s.append(published.apply_s)
                verify_s.append(published.verify_s)
            else:
                copy_s.append(num_bytes / copy_bandwidth(num_bytes))
    count = len(engines)
    what = f"{num_bytes / 1e6:.0f} MB, verification included"
    limits = [count * seconds for seconds in copy_s]
    each = ratio_figure(
        f"publish to {count} ÷ copies",
        Pairs(publish_s, limits),
        "s",
        better="lower",
        target=TARGET if count == 1 else None,
        detail=f"{what}; {count} × bytes ÷ copy bandwidth",
    )
    applied = ratio_figure(
        f"publish to {count}, of it writing and packing ÷ copies",
        Pairs(apply_s, copy_s),
        "s",
        better="lower",
        detail="on the slowest engine",
    )
    verified = ratio_figure(
        f"publish to {count}, of it verification ÷ copies", Pairs(verify_s, copy_s), "s", better="lower"
    )
    return [each, applied, verified]


def copy_bandwidth(num_bytes: int) -> float:
    """Bytes per second of copying `num_bytes`, the fastest of COPIES."""
    source, target = torch.ones(num_bytes, dtype=torch.uint8), torch.zeros(num_bytes, dtype=torch.uint8)
    seconds = []
    for _ in range(COPIES):
        started = perf_counter()
        target.copy_(source)
        seconds.append(perf_counter() - started)
    return num_bytes / min(seconds)


class AsIs:
    """Replaces the supervisor; restarts nothing."""

    async def keep(
        self,
        group: ActorGroup,  # noqa: ARG002
        work: Callable[[], Awaitable[T]],
        prepare: Callable[[], Awaitable[None]] | None = None,  # noqa: ARG002
    ) -> T:
        return await work()


def _policy(work: Work) -> ActorGroup:
    config = work.config
    threads = int(config.policy.cpus_per_rank)
    arguments = {"policy": config.policy, "context": rank_context(config), "group": Group(threads=threads)}
    return ActorGroup("policy", [_actor(PublishingPolicy, threads, **arguments)])


def _engines(work: Work, count: int) -> ActorGroup:
    config = work.config
    threads = int(config.rollout.cpus_per_replica)
    context = EngineContext(
        model=config.model,
        threads=threads,
        max_samples=config.rollout.shard_size,
        rollout=config.rollout.model_copy(update={"kv_cache_gib": KV_CACHE_GIB}),
        publish=config.publish,
        version=None,
    )
    arguments = {"context": context, "cache": config.run.cache}
    return ActorGroup("rollout", [_actor(RolloutWorker, threads, **arguments) for _ in range(count)])


def _actor(worker: type[Any], threads: int, **arguments: Any) -> Any:
    variables = environment(threads, on_gpu=False)
    return as_actor(worker).options(num_cpus=1, runtime_env={"env_vars": variables}).remote(**arguments)


@contextmanager
def _ray() -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="pub", dir="/tmp") as folder:  # Ray's socket paths must be short
        ray.init(num_cpus=1 + MOST_ENGINES, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        try:
            yield
        finally:
            ray.shutdown()


if __name__ == "__main__":
    main()
