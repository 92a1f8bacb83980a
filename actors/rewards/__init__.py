"""Sources of rewards. A source returns a score or a failure for each sample; a failure never becomes a score of 0.

model   a reward model that takes text or tokens
rules   functions of (prompt, response, meta)
http    an endpoint
judge   a language model at an endpoint
gold    the rule that simulates a human labeller
environment   the environment with which the sample was drawn
weighted      a weighted sum of the others
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

DISAGREEMENT = "disagreement"
"""The part of a reward that holds the standard deviation over the heads of a reward model."""


@dataclass(frozen=True)
class Score:
    """The result for one sample. `value` None is a failure, and `error` is the reason.

    `parts` are before weighting, normalisation and clipping. `tokens_cut`: number of tokens cut at the start.
    """

    value: float | None
    parts: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    tokens_cut: int = 0


class RewardSource(Protocol):
    def scores(self, table: pa.Table) -> Sequence[Score]:
        """One Score per row of a schema.ROLLOUT table. Raises RewardError if the whole source fails."""


@dataclass(frozen=True)
class RewardContext:
    """Inputs of a source in addition to its config section.

    Args:
        policy: the model whose samples are scored.
        template: text of the policy's chat template, if it replaces the model's own.
        cache: folder of converted models, and of judges' answers.
        total_s: time limit of rules and endpoints for one shard.
        judge_templates: texts of the judges' templates that replace the shipped one, by the key of their section.
        key: of the source's section in the config.
        threads: CPU threads of the replica.
        adds_episodes: samples may be episodes of an environment, whose rewards are added.
    """

    policy: ModelConfig
    template: str | None
    cache: Path
    limits: RuleLimits
    total_s: float
    threads: int = 1
    judge_templates: Mapping[str, str] = field(default_factory=dict)
    key: str = "reward"
    adds_episodes: bool = False


@dataclass(frozen=True)
class Sample:
    """One sample as text, the input of rules."""

    prompt: str
    response: str
    meta: Mapping[str, Any]


def samples(table: pa.Table) -> Iterator[Sample]:
    columns = (table[name].to_pylist() for name in ("prompt_text", "response_text", "meta"))
    for prompt, response, meta in zip(*columns, strict=True):
        yield Sample(prompt, response, json.loads(meta))
