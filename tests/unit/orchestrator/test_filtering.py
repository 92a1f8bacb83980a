"""Dynamic sampling: prompts that teach nothing are replaced, a bounded number of times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from orchestrator.concurrency import together
from orchestrator.filtering import DynamicSampling, as_sampled
from orchestrator.sampler import Sampler, StepRollouts
from orchestrator.types import PromptGroup, Sampling, ScoredShard
from orchestrator.watching.telemetry import Telemetry, read_lines
from tests.unit.orchestrator.fakes import Diary, FakeRollouts, FakeSchedule

PROMPTS = 4  # of a step: two shards with two prompts each


@dataclass
class Rewards:
    """Whether the rewards differ, of the prompts of each round, which are drawn from so many different ones."""

    mixed: Sequence[Sequence[bool]]
    num_prompts: int
    asked: list[int] = field(default_factory=list)

    async def groups(self, shard: ScoredShard) -> list[PromptGroup]:
        self.asked.append(shard.rollout.index)
        flags = [flag for of_round in self.mixed for flag in of_round]
        numbers = range(2 * shard.rollout.index, 2 * shard.rollout.index + 2)
        return [PromptGroup(number, f"p{number % self.num_prompts}", 1.0, is_mixed=flags[number]) for number in numbers]


async def score(rollouts: StepRollouts) -> list[ScoredShard]:
    return [ScoredShard(shard, (), (), (), ()) for shard in await together(rollouts.shards)]


async def filtered(
    tmp_path: Path, mixed: Sequence[Sequence[bool]], *, rounds: int, num_prompts: int = 99
) -> tuple[list[int], list[str]]:
    """(numbers of the prompts that are learned from, lines on the console)"""
    said: list[str] = []
    sampler = Sampler(
        FakeRollouts(Diary(), version=0),
        FakeSchedule(8),
        sampling=Sampling(),
        samples_per_shard=4,
        max_staleness=0,
        takes_turns=True,
    )
    telemetry = Telemetry(tmp_path, "run", 1, console=said.append)
    rewards = Rewards(mixed, num_prompts)
    sampling = DynamicSampling(rewards, sampler, telemetry, prompts_per_step=PROMPTS, rounds=rounds)
    first = await score(await sampler.more(7, 0, first_index=0))
    found = await sampling(7, first, score)
    assert [shard.rollout.index for shard in found] == list(range(len(found)))
    return [number for shard in found for number in shard.groups or ()], said


YES, NO = [True] * 4, [False] * 4


async def test_a_step_of_prompts_that_all_teach_something_is_left_alone(tmp_path: Path) -> None:
    assert await filtered(tmp_path, [YES], rounds=3) == ([0, 1, 2, 3], [])
    assert not (tmp_path / "events.jsonl").exists()


async def test_prompts_that_teach_nothing_are_replaced_by_as_many_others(tmp_path: Path) -> None:
    found, said = await filtered(tmp_path, [[True, False, False, True], [False, True, True, True]], rounds=3)
    assert (found, said) == ([0, 3, 5, 6], [])
    (event,) = read_lines(tmp_path / "events.jsonl")
    assert (event["kind"], event["rounds"], event["sampled"]) == ("filtered", 1, 8)
    assert event["same_reward"] == {"p1": 1.0, "p2": 1.0, "p4": 1.0}


async def test_the_rounds_are_bounded_and_the_prompts_are_named(tmp_path: Path) -> None:
    found, said = await filtered(tmp_path, [NO, NO, [False, True, False, False]], rounds=2)
    assert found == [9]
    assert len(said) == 1
    assert "only 1 of 4 prompts have samples with different rewards after 2 further rounds" in said[0]
    assert "11 of 12 prompts, among them p0 (1), p1 (1)" in said[0] and "Raise algorithm.filter_rounds" in said[0]


async def test_prompts_that_were_drawn_twice_are_counted_twice(tmp_path: Path) -> None:
    _, said = await filtered(tmp_path, [NO, NO], rounds=1, num_prompts=3)
    assert "same reward for 8 of 8 prompts, among them p0 (1)" in said[0]


@pytest.mark.parametrize("rounds", [0, 1])
async def test_where_nothing_teaches_the_steps_own_prompts_are_learned_from(tmp_path: Path, rounds: int) -> None:
    assert (await filtered(tmp_path, [NO, NO], rounds=rounds))[0] == [0, 1, 2, 3]


async def test_without_dynamic_sampling_all_prompts_are_learned_from() -> None:
    shards = [ScoredShard(rollout, (), (), (), ()) for rollout in ("one", "two")]  # type: ignore[arg-type]
    assert await as_sampled(0, shards, score) == shards
    assert [shard.groups for shard in shards] == [None, None]
