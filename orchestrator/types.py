"""Values that the coordinator and the roles exchange: frozen, small, without tensors.

Bulk data (tokens, log-probs, weights) stays with the workers. The coordinator holds a `Handle` (with Ray: an object
reference to an Arrow table, see schema.py) and a summary of a few numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Handle = Any  # opaque to the orchestrator
Metrics = Mapping[str, float]

GREEDY = -1  # sample_index of a sample at temperature 0, whose reward is a baseline; it is not learned from


@dataclass(frozen=True, eq=False)
class Prompt:
    """One tokenized prompt.

    Args:
        id: stable identity, given in the data or derived from the text.
        text: readable text that the user wrote.
        tokens: int32 token ids in the policy's chat template, including the generation prompt.
        meta: other fields of the record (`answer`, `tests`, ...), for rule rewards.
    """

    id: str
    text: str
    tokens: npt.NDArray[np.int32]
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class SampleRequest:
    """One sample to draw; all its randomness derives from `seed`. A sample whose index is GREEDY is drawn at
    temperature 0."""

    row: int
    prompt: Prompt
    sample_index: int
    seed: int

    @property
    def is_greedy(self) -> bool:
        return self.sample_index == GREEDY


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. top_p = 1 and top_k = -1 sample from the model's unchanged distribution."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_new_tokens: int = 64


@dataclass(frozen=True, eq=False)
class ShardRequest:
    """The unit of sampling: requests sent to one engine together, independent of the number of engines."""

    step: int
    index: int
    requests: Sequence[SampleRequest]
    sampling: Sampling


@dataclass(frozen=True, eq=False)
class RolloutShard:
    """Samples of one shard. `handle` refers to a table of schema.ROLLOUT. `num_response_tokens`: learned tokens."""

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
    """A rollout shard with its scores. Each sequence has one handle per part (rank).

    Args:
        groups: numbers of the prompts that are learned from; None: all.
    """

    rollout: RolloutShard
    old_logprobs: Sequence[Handle]
    ref_logprobs: Sequence[Handle]
    values: Sequence[Handle]
    rewards: Sequence[Handle]
    groups: tuple[int, ...] | None = None

    def scores(self) -> dict[str, list[Handle]]:
        """The handles by content, the input of a recorder."""
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
    """Count, sum and sum of squares over tokens. `merge` is exact (math.fsum), so the grouping does not matter."""

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
    """A manifest's entry about one committed Parquet file of the experience log."""

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
    """The input of learning step `step`. `handles[i]` refers to the EXPERIENCE table of `records[i]`."""

    step: int
    records: Sequence[ShardRecord]
    handles: Sequence[Handle]
    advantage_mean: float
    advantage_std: float
    kl_coefficient: float
    metrics: Metrics


@dataclass(frozen=True)
class State:
    """The coordinator's state between steps. The state of models is in their checkpoints.

    `step` counts finished learning steps; it is also the version of the policy's weights. `part_moments`: of the scores
    of sources with `standardise: running`, over all steps.
    """

    step: int
    kl_coefficient: float
    part_moments: Mapping[str, Moments] = field(default_factory=dict)

    @property
    def version(self) -> int:
        return self.step

    def advance(self, kl_coefficient: float, part_moments: Mapping[str, Moments]) -> State:
        return State(self.step + 1, kl_coefficient, part_moments)


@dataclass(frozen=True)
class PublishReport:
    """The result of a verified publish of `version` to all engines: number of tensors compared, and time.

    Args:
        verify_s: part of `seconds` that the slowest engine spent on checksums and reading back.
        apply_s: part of `seconds` in which its library loaded and packed the weights.
    """

    version: int
    num_engines: int
    num_tensors: int
    num_bytes: int
    seconds: float
    verify_s: float
    apply_s: float = 0.0


@dataclass(frozen=True)
class PromptGroup:
    """The samples of one prompt.

    Args:
        number: of the prompt in its step.
        mean_reward: of the samples whose reward did not fail; None if all failed.
        is_mixed: whether at least two rewards differ.
    """

    number: int
    prompt_id: str
    mean_reward: float | None
    is_mixed: bool
