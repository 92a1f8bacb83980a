"""Steps in which an engine and a learner take turns: wake weights, publish, wake the cache, sample, score, learn.

The same body runs on a CPU, where nothing sleeps, and on a GPU that both share.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from actors.remote.publisher import BucketPublisher, PolicyWeights
from actors.remote.roles import LearnMethods, RayLearner, RayRollouts
from actors.roles.policy import PolicyWorker
from orchestrator.turns import SharedGpus
from orchestrator.types import Experience, Sampling
from tests.integration.engine_scenarios import shard
from tests.integration.publishing_sides import CALL_S, Sides
from tests.numerics.samples import experience

STEPS = 3
LEARNING_RATE = 1e-2


@dataclass(frozen=True)
class Step:
    """Args:
    version: of the weights that sampled.
    differs: mean difference of the engine's log-probs from the policy's.
    logprobs: the policy's, of the samples of the first step.
    """

    version: int
    differs: float
    logprobs: list[float]
    grad_norm: float


async def steps_in_turns(sides: Sides, publisher: BucketPublisher) -> list[Step]:
    rollouts = RayRollouts(sides.engines, generate_s=CALL_S, sleeps=sides.sleeps)
    limits = {"score_s": CALL_S, "learn_s": CALL_S, "save_s": CALL_S}
    policy = RayLearner(
        sides.policy,
        LearnMethods(PolicyWorker.logprobs),
        seed=1,
        shards_per_step=1,
        weights=PolicyWeights(),
        **limits,
    )
    turns = SharedGpus(rollouts, {"policy": policy})
    found: list[Step] = []
    first: Any = None
    for step in range(STEPS):
        async with turns.hold("publish"):
            await publisher.publish(step)
        async with turns.hold("sample"):
            sampled = await rollouts.generate(shard(sampling=Sampling(max_new_tokens=24), num_samples=8))
        first = first or sampled
        async with turns.hold("score"):
            (mine,), (old,) = await policy.score(sampled), await policy.score(first)
        table, scores = ray.get(sampled.handle), ray.get(mine)
        async with turns.hold("policy"):
            metrics = await policy.learn(_experience(step, table, scores))
        told, computed = (_flat(each) for each in (table["engine_logprobs"], scores["logprobs"]))
        difference = float(np.abs(told - computed).mean())
        logprobs = _flat(ray.get(old)["logprobs"]).tolist()
        found.append(Step(sampled.version, difference, logprobs, metrics["grad_norm"]))
    return found


def _experience(step: int, rollout: pa.Table, scores: pa.Table) -> Experience:
    """Made-up advantages of the tokens that were sampled."""
    lengths = [
        (len(prompt), len(response))
        for prompt, response in zip(
            rollout["prompt_tokens"].to_pylist(), rollout["response_tokens"].to_pylist(), strict=True
        )
    ]
    table = experience(lengths, seed=step, old_logprobs=scores["logprobs"].combine_chunks())
    for name in ("prompt_tokens", "response_tokens"):
        table = table.set_column(table.column_names.index(name), name, rollout[name])
    handles = [ray.put(table)]
    return Experience(step, [], handles, advantage_mean=0.0, advantage_std=1.0, kl_coefficient=0.0, metrics={})


def _flat(column: pa.ChunkedArray) -> Any:
    return np.concatenate([np.asarray(row) for row in column.to_pylist()])


def require_learning(steps: list[Step], *, tolerance: float) -> None:
    """Each step samples with what the one before learned, and the policy computes the same log-probs."""
    assert [step.version for step in steps] == list(range(STEPS))
    assert all(step.differs < tolerance for step in steps)
    assert all(step.grad_norm > 0 for step in steps)
    for before, after in itertools.pairwise(steps):
        moved = np.abs(np.subtract(after.logprobs, before.logprobs)).mean()
        assert moved > 5 * tolerance, "learning changed nothing"
