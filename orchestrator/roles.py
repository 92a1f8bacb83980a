"""The calls that the coordinator makes to the roles. All calls are awaited, have deadlines, and fail with an RlhfError,
mostly errors.RoleError. actors/ implements these Protocols on Ray; tests implement them in memory.

    waits in one step

    sampler      waits for  Rollouts.generate        one call per shard, in parallel over the engines
    coordinator  waits for  Scorer.score             four scorers, each shard as soon as it is sampled
    coordinator  waits for  Recorder.record          one call per shard: join, advantages, write Parquet
    coordinator  waits for  Learner.learn            policy and critic at the same time
    coordinator  waits for  Publisher.publish        the policy's weights, to all engines, verified
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from orchestrator.types import (
    EvaluatedShard,
    Experience,
    Handle,
    Metrics,
    PromptGroup,
    PublishReport,
    RolloutShard,
    ScoredShard,
    ShardRecord,
    ShardRequest,
    State,
)

Tag = Literal["weights", "kv_cache"]
"""A part of an engine that sleeps and wakes; vLLM's names."""


class Trimming(Protocol):
    """A model that computes on shared GPUs."""

    async def trim(self) -> None:
        """Returns the GPU memory that its processes keep for their next computation (no-op on CPUs). May be
        repeated."""


class Resting(Trimming, Protocol):
    """A learner that can leave shared GPUs. Both calls may be repeated, and trim."""

    async def rest(self) -> None:
        """Moves gradients, master weights and optimizer states to the host; the weights stay."""

    async def resume(self) -> None:
        """Moves them back."""


class Rollouts(Protocol):
    """All rollout engines together."""

    @property
    def num_engines(self) -> int: ...

    async def generate(self, request: ShardRequest) -> RolloutShard:
        """Samples one shard on the next free engine. Raises RoleError if the engine fails."""

    async def wake(self, tags: Sequence[Tag]) -> None:
        """Brings parts of sleeping engines back to their GPUs (no-op if they share none): weights before an update,
        the KV cache before sampling."""

    async def sleep(self, level: int) -> None:
        """Frees the engines' GPU memory (no-op if they share no GPU). 1: weights are kept on the host; 2: they are
        lost, and a publish must follow before sampling."""


class Scorer(Protocol):
    """A model, or rule functions, that scores every sample of a shard."""

    async def score(self, shard: RolloutShard) -> Sequence[Handle]:
        """Returns handles of tables with `row` and this scorer's columns (LOGPROBS, VALUES or REWARDS)."""


class Learner(Scorer, Protocol):
    """A model that learns: the policy or the critic."""

    async def learn(self, experience: Experience) -> Metrics:
        """Runs all epochs and minibatches of one step. Raises NonFiniteError before a non-finite update is applied."""

    async def save(self, folder: Path) -> None:
        """Writes weights, master weights, optimizer and schedule to an existing folder, one file set per rank."""

    async def load(self, folder: Path) -> None:
        """Restores a saved state. Raises StorageError if it does not fit this learner."""

    async def export(self, folder: Path) -> None:
        """Writes a Hugging Face folder: safetensors, tokenizer, generation config."""


class NoCritic:
    """Replaces the critic in runs whose algorithm needs none."""

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
        """Sends the policy's current weights to all engines as `version`, and verifies them.

        Raises PublishError, which names the tensors that differ between an engine and the learner.
        """


class Recorder(Protocol):
    """Assembles and writes experience on the nodes that hold the data; the experience log writes the manifest."""

    async def record(self, shard: ScoredShard, *, state: State, file: str) -> tuple[Handle, ShardRecord]:
        """Joins a shard's scores, computes token rewards and advantages, writes `file` durably; (table, record).
        `state` is the one before the step."""

    async def load(self, record: ShardRecord, *, file: str) -> Handle:
        """Reads a committed file and verifies its checksum. Raises StorageError, which names the file."""

    async def evaluate(self, shards: Sequence[EvaluatedShard], *, file: str) -> Metrics:
        """Joins held-out samples with their scores and gold scores, writes `file`, returns `evaluation/*` metrics."""


class Grouping(Protocol):
    """Reads scored shards where the data is. Only dynamic sampling needs it (filtering.py)."""

    async def groups(self, shard: ScoredShard) -> Sequence[PromptGroup]:
        """The prompts of a shard, with whether the rewards of their samples differ."""


@dataclass(frozen=True, kw_only=True)
class Learners:
    """The roles that learn."""

    policy: Learner
    critic: Learner = NoCritic()  # noqa: RUF009  it has no state

    @property
    def by_role(self) -> Mapping[str, Learner]:
        """The existing learners by role name."""
        return {
            role: learner
            for role, learner in (("policy", self.policy), ("critic", self.critic))
            if not isinstance(learner, NoCritic)
        }


@dataclass(frozen=True, kw_only=True)
class Roles(Learners):
    """All roles of reinforcement learning, as the coordinator and evaluation use them."""

    rollouts: Rollouts
    reference: Scorer
    reward: Scorer
    recorder: Recorder
    publisher: Publisher


class Trackers(Protocol):
    """A destination of metrics in addition to the run's JSONL file."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...
