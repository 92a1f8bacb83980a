"""In-memory roles: they implement the Protocols, keep a diary, and need neither ray nor torch."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from orchestrator.errors import RoleDied
from orchestrator.roles import Tag
from orchestrator.types import (
    EvaluatedShard,
    Experience,
    Handle,
    Metrics,
    Moments,
    Prompt,
    PublishReport,
    RolloutShard,
    SampleRequest,
    ScoredShard,
    ShardRecord,
    ShardRequest,
    State,
)

TOKENS_PER_SAMPLE = 5


@dataclass
class Diary:
    """What happened, in order, as (what, step or version)."""

    entries: list[tuple[str, int]] = field(default_factory=list)

    def note(self, what: str, number: int) -> None:
        self.entries.append((what, number))

    def of(self, what: str) -> list[int]:
        return [number for name, number in self.entries if name == what]


@dataclass
class FakeRollouts:
    diary: Diary
    version: int | None = None
    fail_in_step: int | None = None
    num_engines: int = 2

    async def generate(self, request: ShardRequest) -> RolloutShard:
        await asyncio.sleep(0)
        assert self.version is not None, "engines without a published version must not serve"
        if request.step == self.fail_in_step:
            raise RoleDied("rollout", 0, "generate", "killed by the test")
        self.diary.note("generate", request.step)
        count = len(request.requests)
        return RolloutShard(
            request.step, request.index, ("shard", request.step), count, 3 * count, 5 * count, self.version, 0, 0.1
        )

    async def wake(self, tags: Sequence[Tag]) -> None:
        for tag in tags:
            self.diary.note(f"wake {tag}", 0)

    async def sleep(self, level: int) -> None:
        self.diary.note("sleep", level)
        if level > 1:
            self.version = None


@dataclass
class FakeLearner:
    """A model that counts: its weights are the number of steps it has learned from, in order."""

    name: str
    diary: Diary
    learned: list[int] = field(default_factory=list)
    metrics_of_step: Mapping[int, Metrics] = field(default_factory=dict)
    may_save: asyncio.Event = field(default_factory=asyncio.Event)
    """Saves wait for it; initially set."""

    def __post_init__(self) -> None:
        self.may_save.set()

    async def score(self, shard: RolloutShard) -> Sequence[Handle]:
        await asyncio.sleep(0)
        self.diary.note("score", shard.step)
        return [(self.name, shard.step)]

    async def learn(self, experience: Experience) -> Metrics:
        await asyncio.sleep(0)
        self.learned.append(experience.step)
        self.diary.note(f"learn {self.name}", experience.step)
        return {"loss": 1.0, "epochs": 1.0, **self.metrics_of_step.get(experience.step, {})}

    async def save(self, folder: Path) -> None:
        await self.may_save.wait()
        (folder / "weights.txt").write_text(",".join(map(str, self.learned)), encoding="utf-8")

    async def load(self, folder: Path) -> None:
        text = (folder / "weights.txt").read_text(encoding="utf-8")
        self.learned = [int(item) for item in text.split(",") if item]

    async def export(self, folder: Path) -> None:
        await self.save(folder)

    async def rest(self) -> None:
        self.diary.note(f"rest {self.name}", 0)

    async def resume(self) -> None:
        self.diary.note(f"resume {self.name}", 0)

    async def trim(self) -> None:
        self.diary.note(f"trim {self.name}", 0)


@dataclass
class FakePublisher:
    diary: Diary
    rollouts: FakeRollouts

    async def publish(self, version: int) -> PublishReport:
        await asyncio.sleep(0)
        self.rollouts.version = version
        self.diary.note("publish", version)
        return PublishReport(version, 2, 10, 100, 0.01, 0.005, 0.002)


@dataclass
class FakeRecorder:
    diary: Diary
    num_dropped: int = 0
    sums_of_step: Mapping[int, Metrics] = field(default_factory=dict)

    async def record(self, shard: ScoredShard, *, state: State, file: str) -> tuple[Handle, ShardRecord]:
        Path(file).write_text("samples", encoding="utf-8")
        self.diary.note("record", shard.rollout.step)
        kept = shard.rollout.num_samples - self.num_dropped
        record = shard_record(Path(file).name, kept, self.num_dropped)
        sums = {**record.sums, **self.sums_of_step.get(shard.rollout.step, {})}
        return ("experience", shard.rollout.step), replace(record, sums=sums)

    async def load(self, record: ShardRecord, *, file: str) -> Handle:
        assert Path(file).exists()
        return ("experience", file)

    async def evaluate(self, shards: Sequence[EvaluatedShard], *, file: str) -> Metrics:
        Path(file).write_text("evaluated", encoding="utf-8")
        self.diary.note("evaluate", shards[0].rollout.step)
        return {"evaluation/gold_mean": 0.5}


def shard_record(file: str, samples: int, dropped: int) -> ShardRecord:
    tokens = float(samples * TOKENS_PER_SAMPLE)
    names = (
        "reward_sum reward_squares_sum kl_k3_token_sum truncated_sum without_eos_sum mismatch_abs_token_sum "
        "mismatch_k3_token_sum return_token_sum return_squares_token_sum residual_token_sum residual_squares_token_sum"
    ).split()
    sums = {
        "samples": float(samples),
        "response_tokens": tokens,
        "response_length_squares_sum": float(samples * TOKENS_PER_SAMPLE**2),
        "kl_k1_token_sum": 0.1 * samples,
        **dict.fromkeys(names, 0.0),
    }
    return ShardRecord(file, "00", 7, samples, dropped, int(tokens), Moments(int(tokens), 0.0, tokens), sums, {})


class FakeSchedule:
    def __init__(self, samples: int) -> None:
        self._samples = samples

    def requests(self, step: int, refill: int = 0) -> Sequence[SampleRequest]:
        prompt = Prompt("p", "text", np.array([1, 2, 3], dtype=np.int32))
        return [SampleRequest(row, prompt, row, 100 * step + row) for row in range(self._samples)]
