"""The ranks to which a shard is sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from actors.groups.group import ActorGroup
from actors.learning.worker import Share
from actors.remote.roles import ShardedScorer
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
