"""The calls that the coordinator makes to the roles. All calls are awaited, have deadlines, and fail with an RlhfError,
mostly errors.RoleError. actors/ implements these Protocols on Ray; tests implement them in memory.

    who waits for whom, in one step

    sampler      waits for  Rollouts.generate        one call per shard, in parallel over the engines
    coordinator  waits for  Scorer.score             four scorers, each shard as soon as it is sampled
    coordinator  waits for  Recorder.record          one call per shard: join, advantages, write Parquet
    coordinator  waits for  Learner.learn            policy and critic at the same time
    coordinator  waits for  Publisher.publish        the policy's weights, to every engine, verified
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from orchestrator.types import (
    EvaluatedShard,
    Experience,
    Handle,
    Metrics,
    PublishReport,
    RolloutShard,
    ScoredShard,
    ShardRecord,
    ShardRequest,
)


class Rollouts(Protocol):
    """All rollout engines together."""

    @property
    def num_engines(self) -> int: ...

    async def generate(self, request: ShardRequest) -> RolloutShard:
        """Samples one shard on the next free engine. Raises RoleError when the engine fails."""

    async def wake(self) -> None:
        """Makes engines ready to sample (no-op if they share no GPU with a learner)."""

    async def sleep(self) -> None:
        """Frees GPU memory for the learners (no-op if they share no GPU)."""


class Scorer(Protocol):
    """A model, or rule functions, that scores every sample of a shard."""

    async def score(self, shard: RolloutShard) -> Sequence[Handle]:
        """Returns handles of tables with `row` and this scorer's columns (LOGPROBS, VALUES or REWARDS)."""


class Learner(Scorer, Protocol):
    """A model that learns: the policy or the critic."""

    async def learn(self, experience: Experience) -> Metrics:
        """Runs all epochs and minibatches of one step. Raises NonFiniteError before anything non-finite is applied."""

    async def save(self, folder: Path) -> None:
        """Writes weights, masters, optimizer and schedule, one file set per rank, into an existing folder."""

    async def load(self, folder: Path) -> None:
        """Restores what `save` wrote. Raises StorageError when it does not fit."""

    async def export(self, folder: Path) -> None:
        """Writes a plain Hugging Face folder: safetensors, tokenizer, generation config."""


class NoCritic:
    """Takes the critic's place in runs whose algorithm needs none."""

    async def score(self, shard: RolloutShard) -> Sequence[Handle]:  # noqa: ARG002  Protocol
        return ()

    async def learn(self, experience: Experience) -> Metrics:  # noqa: ARG002  Protocol
        return {}

    async def save(self, folder: Path) -> None:
        pass

    async def load(self, folder: Path) -> None:
        pass

    async def export(self, folder: Path) -> None:
        pass


class Publisher(Protocol):
    async def publish(self, version: int) -> PublishReport:
        """Brings every engine to the policy's current weights, announced as `version`, and proves it.

        Raises PublishError naming the tensors on which an engine and the trainer disagree.
        """


class Recorder(Protocol):
    """Assembles experience near the data and writes it; the experience log keeps the manifest."""

    async def record(self, shard: ScoredShard, *, kl_coefficient: float, file: str) -> tuple[Handle, ShardRecord]:
        """Joins a shard's scores, computes token rewards and advantages, writes `file` durably; (table, record)."""

    async def load(self, record: ShardRecord, *, file: str) -> Handle:
        """Reads a committed file back, its checksum verified. Raises StorageError naming the file."""

    async def evaluate(self, shards: Sequence[EvaluatedShard], *, file: str) -> Metrics:
        """Joins held-out samples with their scores and gold scores, writes `file`, returns `evaluation/*` metrics."""


@dataclass(frozen=True, kw_only=True)
class Learners:
    """What learns."""

    policy: Learner
    critic: Learner = NoCritic()  # noqa: RUF009  it has no state

    @property
    def by_role(self) -> Mapping[str, Learner]:
        """Those that there are, by the name of their role."""
        return {
            role: learner
            for role, learner in (("policy", self.policy), ("critic", self.critic))
            if not isinstance(learner, NoCritic)
        }


@dataclass(frozen=True, kw_only=True)
class Roles(Learners):
    """All roles of reinforcement learning: the one value that the coordinator and evaluation are handed."""

    rollouts: Rollouts
    reference: Scorer
    reward: Scorer
    recorder: Recorder
    publisher: Publisher


class Trackers(Protocol):
    """A destination of metrics besides the run's JSONL file."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...
