"""The sampler: fixed shards, in step order, never further ahead than allowed, nothing left running."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from orchestrator.concurrency import together
from orchestrator.errors import RoleDied
from orchestrator.sampler import Sampler, cut_into_shards
from orchestrator.types import RolloutShard, Sampling, ShardRequest
from tests.unit.orchestrator.fakes import Diary, FakeRollouts, FakeSchedule

SAMPLING = Sampling()


@dataclass
class SlowRollouts(FakeRollouts):
    """Answers only when released."""

    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    under_way: int = 0

    async def generate(self, request: ShardRequest) -> RolloutShard:
        self.under_way += 1
        try:
            await self.go_on.wait()
            return await super().generate(request)
        finally:
            self.under_way -= 1


def sampler_of(rollouts: FakeRollouts, *, max_staleness: int = 0, takes_turns: bool = False) -> Sampler:
    return Sampler(
        rollouts,
        FakeSchedule(8),
        sampling=SAMPLING,
        samples_per_shard=4,
        max_staleness=max_staleness,
        takes_turns=takes_turns,
    )


@pytest.mark.parametrize(("samples", "sizes"), [(8, [4, 4]), (9, [4, 4, 1]), (3, [3]), (0, [])])
def test_shards_are_cut_in_order_by_size_alone(samples: int, sizes: list[int]) -> None:
    requests = FakeSchedule(samples).requests(5)
    shards = cut_into_shards(5, requests, samples_per_shard=4, sampling=SAMPLING)
    assert [len(shard.requests) for shard in shards] == sizes
    assert [shard.index for shard in shards] == list(range(len(sizes)))
    assert [request for shard in shards for request in shard.requests] == list(requests)
    assert {(shard.step, shard.sampling) for shard in shards} <= {(5, SAMPLING)}


async def test_steps_come_in_order_with_all_their_shards() -> None:
    rollouts = FakeRollouts(Diary(), version=0)
    sampler = sampler_of(rollouts)
    async with sampler.running(first_step=3, end_step=6):
        for step in (3, 4, 5):
            await sampler.announce(step)
            ready = await sampler.next()
            shards = await together(ready.shards)
            assert ready.step == step
            assert [(shard.step, shard.index) for shard in shards] == [(step, 0), (step, 1)]


async def test_nothing_is_sampled_before_its_version_is_announced() -> None:
    rollouts = FakeRollouts(Diary(), version=0)
    sampler = sampler_of(rollouts, max_staleness=1)
    async with sampler.running(first_step=0, end_step=9):
        await _settle()
        assert rollouts.diary.of("generate") == []
        await sampler.announce(0)
        await _settle()
        assert set(rollouts.diary.of("generate")) == {0, 1}


async def test_engines_that_take_turns_finish_before_anyone_gets_the_samples() -> None:
    rollouts = FakeRollouts(Diary(), version=0)
    sampler = sampler_of(rollouts, takes_turns=True)
    async with sampler.running(first_step=0, end_step=2):
        await sampler.announce(0)
        await _settle()
        assert rollouts.diary.entries == [], "sampled before it was requested"
        ready = await sampler.next()
        assert [what for what, _ in rollouts.diary.entries] == ["generate", "generate"]
        assert len(await together(ready.shards)) == 2


@pytest.mark.parametrize("takes_turns", [True, False])
async def test_what_failed_in_an_engine_is_raised_to_who_waits(takes_turns: bool) -> None:
    rollouts = FakeRollouts(Diary(), version=0, fail_in_step=0)
    sampler = sampler_of(rollouts, takes_turns=takes_turns)
    async with sampler.running(first_step=0, end_step=2):
        await sampler.announce(0)
        with pytest.raises(RoleDied, match="killed by the test"):
            await together((await sampler.next()).shards)


async def test_a_schedule_that_raises_is_raised_to_who_waits() -> None:
    class Broken:
        def requests(self, step: int, _refill: int = 0) -> list[object]:
            raise ValueError(f"no prompts for step {step}")

    sampler = Sampler(
        FakeRollouts(Diary(), version=0),
        Broken(),  # type: ignore[arg-type]
        sampling=SAMPLING,
        samples_per_shard=4,
        max_staleness=0,
        takes_turns=False,
    )
    async with sampler.running(first_step=0, end_step=2):
        await sampler.announce(0)
        with pytest.raises(ValueError, match="no prompts for step 0"):
            await sampler.next()


@pytest.mark.parametrize("takes_turns", [True, False])
async def test_nothing_runs_on_after_the_sampler_is_left(takes_turns: bool, tmp_path: Path) -> None:
    rollouts = SlowRollouts(Diary(), version=0)
    sampler = sampler_of(rollouts, takes_turns=takes_turns)
    async with sampler.running(first_step=0, end_step=2):
        await sampler.announce(0)
        waiting = asyncio.create_task(sampler.next())
        await _settle()
        assert rollouts.under_way == 2
        waiting.cancel()
    assert rollouts.under_way == 0
    assert asyncio.all_tasks() - {asyncio.current_task()} <= {waiting}


async def _settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)
