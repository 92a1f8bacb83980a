"""Reads the states and head scores of a reward model, by which items for people are chosen."""

from __future__ import annotations

import pyarrow as pa

from actors.rewards import RewardContext
from actors.rewards.model import build
from orchestrator.config.rewards import ModelSource


class StatesWorker:
    """One replica. The constructor loads the model.

    Raises:
        ConfigError, DataError: the model can't be loaded; see RewardModel.
    """

    def __init__(self, reward: ModelSource, context: RewardContext) -> None:
        self._model = build(reward, context)

    def states(self, table: pa.Table) -> pa.Table:
        """Table of schema.STATES for a table of schema.ROLLOUT, row by row."""
        return self._model.states(table)
