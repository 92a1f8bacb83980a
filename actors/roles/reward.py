"""The reward role: one replica scores whole shards, from a model, from rules or from an endpoint."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from actors.rewards import RewardSource, Score
from actors.rewards.http import HttpReward
from actors.rewards.rules import RuleReward
from actors.text.templates import OWN_CHAT, ChatSettings
from orchestrator import schema
from orchestrator.config.rewards import HttpRewardConfig, RuleConfig, RuleLimits
from orchestrator.errors import ConfigError


@dataclass(frozen=True)
class RewardSettings:
    """Args:
    kind: key of SOURCES.
    limits: of the rules' process.
    total_s: time for one shard, of rules and endpoints.
    model: folder or name of the reward model; `policy` of the policy, with its `chat` (kind: model).
    max_length: longer transcripts lose their start, counted. Null: what the model can take.
    """

    kind: Literal["model", "rules", "http"]
    rules: tuple[RuleConfig, ...] = ()
    limits: RuleLimits = RuleLimits()  # noqa: RUF009  frozen
    total_s: float = 480.0
    http: HttpRewardConfig | None = None
    model: str | None = None
    policy: str | None = None
    cache_dir: Path = Path("~/.cache/rlhf-orchestrator")
    chat: ChatSettings = OWN_CHAT
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    micro_batch_tokens: int = 4096
    max_length: int | None = None
    normalise: bool = True
    trust_remote_code: bool = False


Builder = Callable[[RewardSettings, int], RewardSource]


class RewardWorker:
    """One replica. Complete when constructed: models are loaded, rules found.

    Raises:
        ConfigError, DataError: the source can't be built; see RewardModel, RuleReward, HttpReward.
    """

    def __init__(self, settings: RewardSettings, *, threads: int = 1) -> None:
        self._source = SOURCES[settings.kind](settings, threads)

    def score(self, table: pa.Table) -> pa.Table:
        """Table of schema.REWARDS for a table of schema.ROLLOUT, row by row.

        Raises:
            RewardError: the source as a whole is down; a single failed sample has a null reward instead.
        """
        return rewards_table(table["row"], self._source.scores(table))


def rewards_table(rows: pa.ChunkedArray, scores: Sequence[Score]) -> pa.Table:
    """Scores as schema.REWARDS. A score that float32 can't hold is a failure."""
    stored = [_storable(score) for score in scores]
    columns = [
        rows,
        pa.array([score.value for score in stored], pa.float32()),
        pa.array([list(score.parts.items()) for score in stored], schema.REWARDS.field("reward_parts").type),
        pa.array([score.error for score in stored], pa.string()),
        pa.array([score.tokens_cut for score in stored], pa.int32()),
    ]
    return pa.table(columns, schema=schema.REWARDS)


def _storable(score: Score) -> Score:
    numbers = [number for number in (score.value, *score.parts.values()) if number is not None]
    with np.errstate(over="ignore"):
        if np.isfinite(np.array(numbers).astype(np.float32)).all():
            return score
    problem = f"not a finite 32-bit number: reward {score.value}, parts {dict(score.parts)}"
    return Score(None, error=problem, tokens_cut=score.tokens_cut)


def _model(settings: RewardSettings, threads: int) -> RewardSource:
    # Imported here: torch takes seconds, and rules and endpoints do without.
    build: Builder = importlib.import_module("actors.rewards.model").from_settings
    return build(settings, threads)


def _rules(settings: RewardSettings, threads: int) -> RewardSource:
    if not settings.rules:
        raise ConfigError("reward.kind='rules' needs reward.rules: list at least one {function: 'module:function'}.")
    return RuleReward(settings.rules, settings.limits, total_s=settings.total_s)


def _http(settings: RewardSettings, threads: int) -> RewardSource:
    if settings.http is None:
        raise ConfigError("reward.kind='http' needs reward.http.url: set the address of the endpoint.")
    http = settings.http
    return HttpReward(
        http.url,
        timeout_s=http.timeout_s,
        retries=http.retries,
        total_s=settings.total_s,
        token_from=http.token_from,
    )


SOURCES: Mapping[str, Builder] = {"model": _model, "rules": _rules, "http": _http}
