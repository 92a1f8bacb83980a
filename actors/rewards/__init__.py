"""Where rewards come from. A source says of every sample a score or a failure; a failure is never a score of zero.

model   a reward model, text in or tokens in
rules   functions of (prompt, response, meta)
http    an endpoint
gold    the rule that stands in for a person
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from orchestrator.config.rewards import RuleLimits
from orchestrator.config.sections import ModelConfig


@dataclass(frozen=True)
class Score:
    """What a source says of one sample: `value` None is a failure, and `error` says why.

    `parts` are raw: before weights, normalising and clipping. `tokens_cut` of the transcript's start were not read.
    """

    value: float | None
    parts: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    tokens_cut: int = 0


class RewardSource(Protocol):
    def scores(self, table: pa.Table) -> Sequence[Score]:
        """One Score per row of a schema.ROLLOUT table. Raises RewardError when the source as a whole is down."""


@dataclass(frozen=True)
class RewardContext:
    """What a source is built from besides its own section of the config.

    Args:
        policy: the model whose samples are scored, and `template`, the text of its chat template if it is not its own.
        cache: folder of converted models.
        total_s: time for one shard, for rules and endpoints.
        threads: CPU threads of the replica.
    """

    policy: ModelConfig
    template: str | None
    cache: Path
    limits: RuleLimits
    total_s: float
    threads: int = 1


@dataclass(frozen=True)
class Sample:
    """One sample as people and rules see it."""

    prompt: str
    response: str
    meta: Mapping[str, Any]


def samples(table: pa.Table) -> Iterator[Sample]:
    columns = (table[name].to_pylist() for name in ("prompt_text", "response_text", "meta"))
    for prompt, response, meta in zip(*columns, strict=True):
        yield Sample(prompt, response, json.loads(meta))
