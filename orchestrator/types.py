"""Values that travel between the coordinator and the roles: frozen, small, without tensors.

Bulk data (tokens, log-probs, weights) stays with the workers; what the coordinator holds is a `Handle` (with Ray:
an object reference to an Arrow table, see schema.py) and a summary of a few numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Handle = Any  # opaque to the orchestrator
Metrics = Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt, ready to sample from.

    Args:
        id: stable identity (given in the data, or derived from its text).
        text: what the user wrote, for people to read.
        tokens: int32 token ids under the policy's chat template, generation prompt included.
        meta: other fields of the record (`answer`, `tests`, ...), for rule rewards.
    """

    id: str
    text: str
    tokens: npt.NDArray[np.int32]
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class SampleRequest:
    """One sample to draw: everything random about it follows from `seed`."""

    row: int
    prompt: Prompt
    sample_index: int
    seed: int


@dataclass(frozen=True)
class Sampling:
    """How to sample. top_p = 1 and top_k = -1 sample from the model's own distribution."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_new_tokens: int = 64


@dataclass(frozen=True, eq=False)
class ShardRequest:
    """The unit of sampling: requests that one engine gets together, whatever the number of engines."""

    step: int
    index: int
    requests: Sequence[SampleRequest]
    sampling: Sampling


@dataclass(frozen=True, eq=False)
class RolloutShard:
    """Samples of one shard. `handle` leads to a table of schema.ROLLOUT; `num_response_tokens` are learned from."""

    step: int
    index: int
    handle: Handle
    num_samples: int
    num_prompt_tokens: int
    num_response_tokens: int
    version: int
    engine: int
    seconds: float


@dataclass(frozen=True, eq=False)
class ScoredShard:
    """A rollout shard with what the four models say about it. Each tuple: one handle per part (rank)."""

    rollout: RolloutShard
    old_logprobs: Sequence[Handle]
    ref_logprobs: Sequence[Handle]
    values: Sequence[Handle]
    rewards: Sequence[Handle]

    def scores(self) -> dict[str, list[Handle]]:
        """The handles by what they hold, as a recorder takes them."""
        return {
            "logprobs": list(self.old_logprobs),
            "ref_logprobs": list(self.ref_logprobs),
            "values": list(self.values),
            "rewards": list(self.rewards),
        }


@dataclass(frozen=True, eq=False)
class EvaluatedShard:
    """Held-out samples with the policy's and the reference's log-probs and the training reward."""

    rollout: RolloutShard
    logprobs: Sequence[Handle]
    ref_logprobs: Sequence[Handle]
    rewards: Sequence[Handle]


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of squares of masked tokens, merged exactly (math.fsum) in any grouping by shards."""

    count: int = 0
    total: float = 0.0
    total_squares: float = 0.0

    @staticmethod
    def merge(parts: Sequence[Moments]) -> Moments:
        return Moments(
            sum(p.count for p in parts),
            math.fsum(p.total for p in parts),
            math.fsum(p.total_squares for p in parts),
        )

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0

    @property
    def std(self) -> float:
        if self.count < 2:
            return 0.0
        variance = (self.total_squares - self.count * self.mean**2) / (self.count - 1)
        return math.sqrt(max(variance, 0.0))


@dataclass(frozen=True)
class ShardRecord:
    """One committed Parquet file of the experience log: what the manifest says of it."""

    file: str
    sha256: str
    num_bytes: int
    num_samples: int
    num_dropped: int
    num_response_tokens: int
    advantage_moments: Moments
    sums: Mapping[str, float]  # named sums over samples or tokens, see algorithms.experience.summarise
    extremes: Mapping[str, float]  # keys end in _min or _max


@dataclass(frozen=True, eq=False)
class Experience:
    """All that learning step `step` reads. `handles[i]` leads to the EXPERIENCE table of `records[i]`."""

    step: int
    records: Sequence[ShardRecord]
    handles: Sequence[Handle]
    advantage_mean: float
    advantage_std: float
    kl_coefficient: float
    metrics: Metrics


@dataclass(frozen=True)
class State:
    """The coordinator's own state between steps; models keep theirs in their checkpoints.

    `step` counts finished learning steps; it is also the version of the policy's weights.
    """

    step: int
    kl_coefficient: float

    @property
    def version(self) -> int:
        return self.step

    def advance(self, kl_coefficient: float) -> State:
        return replace(self, step=self.step + 1, kl_coefficient=kl_coefficient)


@dataclass(frozen=True)
class PublishReport:
    """Proof that every engine holds `version`: tensors compared on every engine, and what it cost.

    Args:
        verify_s, apply_s: of `seconds`, what the slowest engine spent on checksums and on reading back, and what its
            library needed to load and pack the weights.
    """

    version: int
    num_engines: int
    num_tensors: int
    num_bytes: int
    seconds: float
    verify_s: float
    apply_s: float = 0.0
