"""The log: a step is committed completely or not at all, and reading returns what was committed."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import RewardError, StorageError, Superseded
from orchestrator.run.experience_log import ExperienceLog, num_committed
from orchestrator.run.storage import read_sealed, write_sealed
from orchestrator.schema import EXPERIENCE
from orchestrator.types import Handle, RolloutShard, ScoredShard, ShardRecord, State
from tests.unit.orchestrator.fakes import Diary, FakeRecorder


@dataclass
class FailingRecorder(FakeRecorder):
    """Fails on one shard after it has written the others."""

    failing: set[int] = field(default_factory=set)

    async def record(self, shard: ScoredShard, *, state: State, file: str) -> tuple[Handle, ShardRecord]:
        if shard.rollout.index in self.failing:
            raise StorageError("disk full")
        return await super().record(shard, state=state, file=file)


def scored(step: int, *, shards: int = 3, samples: int = 10) -> list[ScoredShard]:
    return [
        ScoredShard(RolloutShard(step, index, ("shard", index), samples, 30, 50, step, 0, 0.1), (), (), (), ())
        for index in range(shards)
    ]


def log_in(
    folder: Path, *, dropped: int = 0, failing: set[int] | None = None, budget: float = 0.1, **more: Any
) -> ExperienceLog:
    recorder = FailingRecorder(Diary(), dropped, failing=failing or set(), **more)
    return ExperienceLog(folder / "log", recorder, max_failed_fraction=budget)


async def test_a_committed_step_is_held_and_loads_as_it_was_committed(tmp_path: Path) -> None:
    log = log_in(tmp_path)
    committed = await log.commit(State(7, 0.1 + 0.2), scored(7))
    loaded = await log_in(tmp_path).load(7)
    assert log.holds(7) and not log.holds(6)
    assert loaded.records == committed.records
    assert loaded.metrics == committed.metrics
    assert (loaded.step, loaded.kl_coefficient) == (7, 0.1 + 0.2)
    assert (loaded.advantage_mean, loaded.advantage_std) == (committed.advantage_mean, committed.advantage_std)
    assert [Path(handle[1]).name for handle in loaded.handles] == [record.file for record in committed.records]


async def test_a_step_that_was_not_wholly_written_is_not_committed_and_can_be_committed_again(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="disk full"):
        await log_in(tmp_path, failing={2}).commit(State(0, 0.1), scored(0))
    assert list((tmp_path / "log" / "step-000000").glob("shard-*.parquet"))
    assert not list((tmp_path / "log").rglob("manifest.json"))
    log = log_in(tmp_path)
    assert not log.holds(0)
    await log.commit(State(0, 0.1), scored(0))
    assert len((await log.load(0)).records) == 3


@pytest.mark.parametrize(("dropped", "budget"), [(1, 0.09), (10, 1.0), (2, 0.0)])
async def test_more_failed_rewards_than_the_budget_stop_the_run_uncommitted(
    tmp_path: Path, dropped: int, budget: float
) -> None:
    log = log_in(tmp_path, dropped=dropped, budget=budget)
    with pytest.raises(RewardError, match=rf"step 4: the reward of {3 * dropped} of 30 samples failed"):
        await log.commit(State(4, 0.1), scored(4))
    assert not log.holds(4)


async def test_samples_that_are_left_out_count_for_the_budget(tmp_path: Path) -> None:
    """Of each shard one sample failed, nine are learned from and ten are left out: 1 of 20."""
    sums = {4: {"samples_left_out": 10.0}}
    await log_in(tmp_path, dropped=1, budget=0.05, sums_of_step=sums).commit(State(4, 0.1), scored(4))
    with pytest.raises(RewardError, match="3 of 60 samples failed"):
        await log_in(tmp_path / "other", dropped=1, budget=0.049, sums_of_step=sums).commit(State(4, 0.1), scored(4))


async def test_the_first_failure_is_part_of_the_error(tmp_path: Path) -> None:
    log = log_in(tmp_path, dropped=2, budget=0.0)
    (tmp_path / "log" / "step-000004").mkdir()
    reasons = [{"row": 3, "reward_error": "rule x: ValueError: no"}, {"row": 5, "reward_error": "another"}]
    text = "".join(json.dumps(reason) + "\n" for reason in reasons)
    (tmp_path / "log" / "step-000004" / "failed-shard-0000.jsonl").write_text(text, encoding="utf-8")
    of_another_attempt = tmp_path / "log" / "step-000004" / "failed-shard-0000-attempt-002.jsonl"
    of_another_attempt.write_text('{"row": 3, "reward_error": "of another attempt"}\n', encoding="utf-8")
    with pytest.raises(RewardError, match=r"The first: rule x: ValueError: no\. The column reward_error"):
        await log.commit(State(4, 0.1), scored(4))


async def test_failed_rewards_within_the_budget_are_counted(tmp_path: Path) -> None:
    experience = await log_in(tmp_path, dropped=1, budget=0.1).commit(State(0, 0.1), scored(0))
    assert experience.metrics["reward/failed"] == 3.0
    assert sum(record.num_samples for record in experience.records) == 27


async def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    log = log_in(tmp_path)
    await log.commit(State(0, 0.1), scored(0))
    manifest = tmp_path / "log" / "step-000000" / "manifest.json"
    manifest.write_text(manifest.read_text()[:-20], encoding="utf-8")
    with pytest.raises(StorageError, match=r"step-000000/manifest\.json is damaged"):
        await log.load(0)


async def test_a_manifest_with_other_numbers_or_of_another_step_is_refused(tmp_path: Path) -> None:
    log = log_in(tmp_path)
    for step in (0, 1):
        await log.commit(State(step, 0.1), scored(step))
    first, second = (tmp_path / "log" / f"step-{step:06d}" / "manifest.json" for step in (0, 1))
    second.write_bytes(first.read_bytes())
    with pytest.raises(StorageError, match=r"step-000001/manifest\.json is damaged: it belongs to step 0"):
        await log.load(1)
    first.write_text(first.read_text().replace('"kl_coefficient": 0.1', '"kl_coefficient": 0.2'), encoding="utf-8")
    with pytest.raises(StorageError, match=r"step-000000/manifest\.json is damaged: .* its own checksum"):
        await log.load(0)


async def test_a_manifest_of_another_format_is_refused(tmp_path: Path) -> None:
    log = log_in(tmp_path)
    await log.commit(State(0, 0.1), scored(0))
    manifest = tmp_path / "log" / "step-000000" / "manifest.json"
    write_sealed(manifest, {**read_sealed(manifest), "format": 99})
    with pytest.raises(StorageError, match="has format 99, this program reads 1"):
        await log.load(0)


async def test_steps_count_as_committed_up_to_the_first_gap(tmp_path: Path) -> None:
    assert num_committed(tmp_path / "log") == 0
    log = log_in(tmp_path)
    for step in (0, 1, 3):
        await log.commit(State(step, 0.1), scored(step))
    assert num_committed(tmp_path / "log") == 2


def test_the_document_names_every_column_with_its_type() -> None:
    text = (Path(__file__).resolve().parents[4] / "docs" / "experience-log.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `(\w+)` \| ([\w<>, ]+) \| \S", text, re.MULTILINE)
    short = {"list<item: int32>": "list<int32>", "list<item: float>": "list<float>", "list<item: bool>": "list<bool>"}
    expected = [(field.name, short.get(str(field.type), str(field.type))) for field in EXPERIENCE]
    assert documented == expected


async def test_of_two_attempts_that_commit_one_step_the_first_wins_and_both_files_never_meet(tmp_path: Path) -> None:
    first, second = (
        ExperienceLog(tmp_path / "log", FakeRecorder(Diary()), max_failed_fraction=0.1, attempt=attempt)
        for attempt in (1, 2)
    )
    committed = await first.commit(State(0, 0.1), scored(0))
    with pytest.raises(Superseded, match="step 0 was committed by another attempt"):
        await second.commit(State(0, 0.1), scored(0))
    assert (await second.load(0)).records == committed.records
    later = await second.commit(State(1, 0.1), scored(1))
    assert {record.file for record in later.records}.isdisjoint(record.file for record in committed.records)


async def test_what_an_attempt_left_uncommitted_goes_with_the_commit_of_the_next(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        await log_in(tmp_path, failing={2}).commit(State(0, 0.1), scored(0))
    recorder = FakeRecorder(Diary())
    second = ExperienceLog(tmp_path / "log", recorder, max_failed_fraction=0.1, attempt=2)
    committed = await second.commit(State(0, 0.1), scored(0))
    found = {path.name for path in (tmp_path / "log" / "step-000000").glob("*.parquet")}
    assert found == {record.file for record in committed.records}


async def test_a_fenced_attempt_commits_nothing(tmp_path: Path) -> None:
    def fence() -> None:
        raise Superseded("attempt 2 writes this run now")

    log = ExperienceLog(tmp_path / "log", FakeRecorder(Diary()), max_failed_fraction=0.1, fence=fence)
    with pytest.raises(Superseded):
        await log.commit(State(0, 0.1), scored(0))
    assert not log.holds(0)
