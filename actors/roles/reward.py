"""The reward role: each replica scores whole shards with a model, rules or an endpoint."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from actors.rewards import RewardContext, Score
from actors.rewards.table import build_source
from orchestrator import schema
from orchestrator.config.rewards import RewardConfig


class RewardWorker:
    """One replica. The constructor loads the model or rules.

    Raises:
        ConfigError, DataError: the source can't be built; see build_source.
    """

    def __init__(self, reward: RewardConfig, context: RewardContext) -> None:
        self._source = build_source(reward, context)

    def score(self, table: pa.Table) -> pa.Table:
        """Table of schema.REWARDS for a table of schema.ROLLOUT, row by row.

        Raises:
            RewardError: the whole source failed. If a single sample fails, its reward is null instead.
        """
        return rewards_table(table["row"], self._source.scores(table))


def rewards_table(rows: pa.ChunkedArray, scores: Sequence[Score]) -> pa.Table:
    """Converts scores to schema.REWARDS. A score outside the range of float32 becomes a failure."""
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
