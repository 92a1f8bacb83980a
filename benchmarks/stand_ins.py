"""Stand-ins for engines and models, driven by the real coordinator with its loop, log, sampler and remote calls.

Stand-ins return tables of the real shape, with RESPONSE_TOKENS tokens per sample.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actors.groups.group import ActorGroup
from actors.learning.objectives.objective import LearnJob
from actors.learning.worker import Share
from actors.remote.roles import LearnMethods, RayLearner, RayRecorder, RayRollouts, ReplicatedScorer, ShardedScorer
from orchestrator import schema
from orchestrator.coordinator import Coordinator
from orchestrator.failures import Unsupervised
from orchestrator.held_out import Evaluation
from orchestrator.roles import Publisher, Roles
from orchestrator.run.checkpoints import Checkpoints
from orchestrator.run.experience_log import ExperienceLog
from orchestrator.sampler import Sampler, Schedule
from orchestrator.types import Metrics, Sampling, ShardRequest
from orchestrator.watching.guards import Guards
from orchestrator.watching.telemetry import Telemetry

RESPONSE_TOKENS = 1024
PROMPT_TOKENS = 128
SAMPLES_PER_SHARD = 64
DEADLINE_S = 120.0


class StandInEngine:
    """Returns random tokens for a shard."""

    def generate(self, request: ShardRequest) -> tuple[pa.Table, dict[str, Any]]:
        requests = request.requests
        count = len(requests)
        generator = np.random.default_rng(requests[0].seed)
        tokens_N = generator.integers(0, 50_000, count * RESPONSE_TOKENS, dtype=np.int32)
        columns = {
            "row": [item.row for item in requests],
            "prompt_id": [item.prompt.id for item in requests],
            "sample_index": [item.sample_index for item in requests],
            "seed": [item.seed for item in requests],
            "prompt_text": [item.prompt.text for item in requests],
            "response_text": ["word " * RESPONSE_TOKENS] * count,
            "prompt_tokens": [item.prompt.tokens.tolist() for item in requests],
            "response_tokens": lists(tokens_N, pa.int32()),
            "learn": lists(np.ones_like(tokens_N, np.bool_), pa.bool_()),
            "starts": [[]] * count,
            "engine_logprobs": lists(random_floats(count, generator)),
            "finish_reason": ["length"] * count,
            "version": [request.step] * count,
            "meta": ["{}"] * count,
        }
        table = pa.table(columns, schema=schema.ROLLOUT)
        counts = {
            "num_samples": count,
            "num_prompt_tokens": count * PROMPT_TOKENS,
            "num_response_tokens": count * RESPONSE_TOKENS,
            "version": request.step,
        }
        return table, counts


class StandInModel:
    """Implements all scorers, and a learner that reads whole tables but does nothing."""

    def logprobs(self, table: pa.Table, share: Share) -> pa.Table:
        table = _of(table, share)
        return pa.table({"row": table["row"], "logprobs": _floats_for(table)}, schema=schema.LOGPROBS)

    def values(self, table: pa.Table, share: Share) -> pa.Table:
        table = _of(table, share)
        bootstrap = pa.array(np.zeros(table.num_rows), pa.float32())
        columns = {"row": table["row"], "values": _floats_for(table), "bootstrap_value": bootstrap}
        return pa.table(columns, schema=schema.VALUES)

    def score(self, table: pa.Table) -> pa.Table:
        count = table.num_rows
        columns = {
            "row": table["row"],
            "reward": [1.0] * count,
            "reward_parts": [[("length", 1.0)]] * count,
            "reward_error": [None] * count,
            "tokens_cut": [0] * count,
        }
        return pa.table(columns, schema=schema.REWARDS)

    def learn(self, tables: list[pa.Table], job: LearnJob) -> dict[str, float]:
        return {"step": float(job.step), "rows": float(sum(table.num_rows for table in tables)), "epochs": 1.0}

    def save(self, folder: Path) -> None:
        (folder / "weights").write_text("none", encoding="utf-8")

    def load(self, folder: Path) -> None:
        (folder / "weights").read_text(encoding="utf-8")

    def export(self, folder: Path) -> None:
        self.save(folder)


def random_floats(count: int, generator: np.random.Generator) -> npt.NDArray[np.float32]:
    return -generator.random(count * RESPONSE_TOKENS, dtype=np.float32)


def lists(flat_N: npt.NDArray[Any], kind: pa.DataType | None = None) -> pa.ListArray:
    offsets = np.arange(0, len(flat_N) + 1, RESPONSE_TOKENS, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat_N, kind or pa.float32()))


def _of(table: pa.Table, share: Share) -> pa.Table:
    return table.take(pa.array(range(share.index, table.num_rows, share.count)))


def _floats_for(table: pa.Table) -> pa.ListArray:
    generator = np.random.default_rng(int(table["seed"][0].as_py()))
    return lists(random_floats(table.num_rows, generator))


def coordinator(
    folder: Path,
    groups: Mapping[str, ActorGroup],
    schedule: Schedule,
    *,
    steps: int,
    publisher: Publisher,
    meter: Callable[[int], Awaitable[Metrics]],
) -> Coordinator:
    """A coordinator over groups `rollout`, `policy`, `critic`, `reference`, `reward` and `recorder`, without evaluation
    and without saves before the last step.
    """
    recorder = RayRecorder(groups["recorder"], record_s=DEADLINE_S)
    rollouts = RayRollouts(groups["rollout"], generate_s=DEADLINE_S, sleeps=False)
    shards = math.ceil(len(schedule.requests(0)) / SAMPLES_PER_SHARD)
    limits: Mapping[str, Any] = {"score_s": DEADLINE_S, "learn_s": DEADLINE_S, "save_s": DEADLINE_S}
    policy = RayLearner(groups["policy"], LearnMethods(StandInModel.logprobs), seed=0, shards_per_step=shards, **limits)
    critic = RayLearner(groups["critic"], LearnMethods(StandInModel.values), seed=0, shards_per_step=shards, **limits)
    reference = ShardedScorer(groups["reference"], StandInModel.logprobs, shards_per_step=shards, score_s=DEADLINE_S)
    reward = ReplicatedScorer(groups["reward"], StandInModel.score, score_s=DEADLINE_S)
    telemetry = Telemetry(folder, "benchmark", 1)
    sampling = Sampling(max_new_tokens=RESPONSE_TOKENS)
    log = ExperienceLog(folder / "log", recorder, max_failed_fraction=0.0)
    roles = Roles(
        policy=policy,
        critic=critic,
        rollouts=rollouts,
        reference=reference,
        reward=reward,
        recorder=recorder,
        publisher=publisher,
    )
    return Coordinator(
        steps=steps,
        critic_warmup_steps=0,
        next_kl_coefficient=lambda coefficient, kl, count: coefficient,
        sampler=Sampler(
            rollouts,
            schedule,
            sampling=sampling,
            samples_per_shard=SAMPLES_PER_SHARD,
            max_staleness=0,
            takes_turns=True,
        ),
        roles=roles,
        log=log,
        checkpoints=Checkpoints(folder / "checkpoints", roles.by_role, every_steps=0, last_step=steps, keep=1),
        evaluation=Evaluation(
            folder / "evaluation",
            (),
            roles=roles,
            telemetry=telemetry,
            sampling=sampling,
            samples_per_shard=SAMPLES_PER_SHARD,
            every_steps=0,
            last_step=steps,
        ),
        guards=Guards((), folder=folder, telemetry=telemetry, past=log.metrics, console=lambda line: None),
        telemetry=telemetry,
        meter=meter,
        supervisor=Unsupervised(),
    )
