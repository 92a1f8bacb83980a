"""Experience from the real recorder, in this process and without Ray: handles are the tables."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest

import actors.roles.recorder
from actors.roles.recorder import RecorderWorker
from orchestrator import schema
from orchestrator.algorithms.experience import ExperienceSettings
from orchestrator.algorithms.ppo import Ppo
from orchestrator.run.experience_log import ExperienceLog
from orchestrator.types import EvaluatedShard, Handle, Metrics, RolloutShard, ScoredShard, ShardRecord, State
from tests.unit.actors.rewards.rollouts import rollout_table

_FLOATS = pa.list_(pa.float32())


class LocalRecorder:
    """The recorder role, served by one worker."""

    def __init__(self) -> None:
        self._worker = RecorderWorker(ExperienceSettings(Ppo(), samples_per_prompt=1), "run-1")

    async def record(self, shard: ScoredShard, *, state: State, file: str) -> tuple[Handle, ShardRecord]:
        return self._worker.record(shard.rollout.handle, shard.scores(), kl_coefficient=state.kl_coefficient, file=file)

    async def load(self, record: ShardRecord, *, file: str) -> Handle:
        return self._worker.load(record, file=file)[0]

    async def evaluate(self, shards: list[EvaluatedShard], *, file: str) -> Metrics:
        raise NotImplementedError


@contextmanager
def experience_log(folder: Path) -> Iterator[ExperienceLog]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(actors.roles.recorder, "_fetch", list)
        yield ExperienceLog(folder, LocalRecorder(), max_failed_fraction=0.1)


def scored_shard(step: int, index: int, *, samples: int = 3, response: str = "I love it") -> ScoredShard:
    tokens = [[4 + row % 7, 5, 0] for row in range(samples)]
    rollout = rollout_table([f"{response} {index}.{row}" for row in range(samples)], response_tokens=tokens)
    logprobs = _floats(-1.0, samples)
    rollout = rollout.set_column(rollout.schema.get_field_index("engine_logprobs"), "engine_logprobs", logprobs)
    row = rollout["row"].combine_chunks()
    values = {"row": row, "values": _floats(0.25, samples), "bootstrap_value": [0.0] * samples}
    rewards = {
        "row": row,
        "reward": [0.5 * number for number in range(samples)],
        "reward_parts": [[("style", 0.5)]] * samples,
        "reward_error": [None] * samples,
        "tokens_cut": [0] * samples,
    }
    return ScoredShard(
        RolloutShard(step, index, rollout, samples, samples, 3 * samples, step, 0, 0.1),
        [pa.table({"row": row, "logprobs": logprobs}, schema=schema.LOGPROBS)],
        [pa.table({"row": row, "logprobs": _floats(-1.5, samples)}, schema=schema.LOGPROBS)],
        [pa.table(values, schema=schema.VALUES)],
        [pa.table(rewards, schema=schema.REWARDS)],
    )


def _floats(value: float, samples: int) -> pa.Array:
    return pa.array([[value] * 3] * samples, _FLOATS)
