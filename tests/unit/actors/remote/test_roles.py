"""The ranks to which a shard is sent, and engines that sleep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from actors.groups.group import ActorGroup
from actors.groups.process import Process
from actors.learning.worker import Share
from actors.remote.roles import RayRollouts, ReplicatedScorer, ShardedScorer
from orchestrator.errors import RoleDied
from orchestrator.types import Handle, RolloutShard


class NotedCalls(ActorGroup):
    """A group that records its calls."""

    async def call_for_bulk(
        self, rank: int, method: Callable[..., Any], deadline_s: float, *args: Any, **kwargs: Any
    ) -> tuple[Handle, Any]:
        return (rank, args[1]), None


async def calls(num_ranks: int, shards_per_step: int | None) -> list[list[tuple[int, Share | None]]]:
    """(rank, share) of each call, by shard."""
    actors: list[Any] = [None] * num_ranks
    scorer = ShardedScorer(NotedCalls("policy", actors), len, shards_per_step=shards_per_step, score_s=1.0)
    shards = [RolloutShard(0, index, "table", 4, 8, 8, 0, 0, 0.1) for index in range(shards_per_step or 2)]
    return [list(await scorer.score(shard)) for shard in shards]  # type: ignore[misc]


async def test_as_many_shards_as_ranks_go_to_one_rank_each() -> None:
    assert await calls(3, 3) == [[(0, Share())], [(1, Share())], [(2, Share())]]
    assert await calls(2, 3) == [[(0, Share())], [(1, Share())], [(0, Share())]]


async def test_ranks_beyond_the_number_of_shards_divide_their_rows() -> None:
    assert await calls(2, 1) == [[(0, Share(0, 2)), (1, Share(1, 2))]]
    assert await calls(5, 2) == [[(0, Share(0, 2)), (1, Share(1, 2))], [(2, Share(0, 2)), (3, Share(1, 2))]]


async def test_ranks_that_hold_one_model_together_all_take_part() -> None:
    assert await calls(2, None) == [[(0, None), (1, None)]] * 2


@pytest.mark.parametrize("num_ranks", [1, 2, 8, 1000])
async def test_calls_grow_with_shards_or_ranks_not_with_both(num_ranks: int) -> None:
    assert sum(map(len, await calls(num_ranks, 16))) <= max(16, num_ranks)


class Trimmers(ActorGroup):
    """Processes that remember who trimmed; rank 1 dies once."""

    def __init__(self) -> None:
        super().__init__("reference", [None] * 2)
        self.trimmed: list[int] = []

    async def call(self, rank: int, method: Callable[..., Any], _deadline_s: float, *_: Any, **__: Any) -> Any:
        assert method is Process.trim
        if rank == 1 and not self.births:
            raise RoleDied("reference", rank, method.__name__, "killed by the test")
        self.trimmed.append(rank)

    async def restart(self, rank: int) -> None:
        self.births[rank] = 1


@pytest.mark.parametrize("kind", [ReplicatedScorer, ShardedScorer])
async def test_all_processes_of_a_scorer_trim_and_one_that_died_is_restarted(kind: Any) -> None:
    group, supervisor = Trimmers(), Restarting()
    more = {"shards_per_step": 1} if kind is ShardedScorer else {}
    await kind(group, len, score_s=1.0, supervisor=supervisor, **more).trim()
    assert group.trimmed[-2:] == [0, 1]


class Sleepers(ActorGroup):
    """Engines that remember what is awake; those in `dying` die once, and are asleep when they are new."""

    def __init__(self, count: int) -> None:
        super().__init__("rollout", [None] * count)
        self.awake: list[set[str]] = [set() for _ in range(count)]
        self.dying: set[int] = set()
        self.caught_up: list[int] = []

    async def call(self, rank: int, method: Callable[..., Any], _deadline_s: float, *args: Any, **_: Any) -> Any:
        if rank in self.dying:
            raise RoleDied("rollout", rank, method.__name__, "killed by the test")
        if method.__name__ == "wake":
            self.awake[rank] |= set(args[0])
        else:
            self.awake[rank] = set()

    async def restart(self, rank: int) -> None:
        self.dying.discard(rank)
        self.awake[rank] = set()
        self.births[rank] = self.births.get(rank, 0) + 1

    async def catch_up(self, rank: int) -> None:
        assert self.awake[rank] == {"weights", "kv_cache"}
        self.caught_up.append(rank)


class Restarting:
    """Restarts what died, and repeats the work."""

    async def keep(self, group: Any, work: Callable[[], Any], prepare: Callable[[], Any] | None = None) -> Any:
        while True:
            try:
                return await work()
            except RoleDied as error:
                await group.restart(error.rank)
                if prepare is not None:
                    await prepare()


def sleeping(group: Sleepers, *, sleeps: bool = True) -> RayRollouts:
    supervisor: Any = Restarting()
    return RayRollouts(group, generate_s=1.0, sleeps=sleeps, supervisor=supervisor, catch_up=group.catch_up)


async def test_engines_wake_in_parts_and_sleep_whole() -> None:
    group = Sleepers(2)
    rollouts = sleeping(group)
    await rollouts.wake(["weights"])
    assert group.awake == [{"weights"}] * 2
    await rollouts.wake(["kv_cache"])
    assert group.awake == [{"weights", "kv_cache"}] * 2
    await rollouts.sleep(2)
    assert group.awake == [set(), set()]
    assert group.caught_up == []


async def test_an_engine_that_is_restarted_wakes_as_far_as_the_others_and_gets_their_weights() -> None:
    group = Sleepers(2)
    rollouts = sleeping(group)
    group.dying = {1}
    await rollouts.wake(["weights"])
    assert (group.awake, group.caught_up) == ([{"weights"}] * 2, [])  # a publish follows
    group.dying = {0}
    await rollouts.wake(["kv_cache"])
    assert (group.awake, group.caught_up) == ([{"weights", "kv_cache"}] * 2, [0])
    group.dying = {1}
    await rollouts.sleep(1)
    assert group.awake == [set(), set()]
    await group.restart(0)
    await rollouts.rouse()
    assert group.awake == [set(), set()]


async def test_engines_that_share_no_gpu_are_never_called() -> None:
    group = Sleepers(1)
    group.dying = {0}
    rollouts = sleeping(group, sleeps=False)
    await rollouts.sleep(1)
    await rollouts.wake(["weights", "kv_cache"])
    assert group.dying == {0}
