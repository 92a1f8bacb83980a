"""Groups of actors on a real Ray: results, RlhfErrors, deaths, deadlines."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

import actors.groups.group
from actors.groups.group import ActorGroup, BusyClock
from actors.groups.process import Several, as_actor
from orchestrator.errors import DeadlineExceeded, NonFiniteError, PeerLost, RoleDied, RoleError
from tests.deadlines import scaled

DEADLINE_S = scaled(60.0)


class Worker:
    def __init__(self, rank: int) -> None:
        self._rank = rank

    def name(self, greeting: str = "rank") -> str:
        return f"{greeting} {self._rank}"

    def bulk(self, rows: int) -> tuple[pa.Table, int]:
        return pa.table({"row": list(range(rows))}), rows

    def only_bulk(self) -> pa.Table:
        return pa.table({"row": [self._rank]})

    def rows_of(self, tables: Any) -> int:
        return sum(table.num_rows for table in tables) if isinstance(tables, list) else tables.num_rows

    def sleep(self, seconds: float) -> str:
        time.sleep(seconds)
        return "woke"

    def fail(self, error: Exception) -> None:
        if self._rank == 1:
            raise error

    def die(self) -> None:
        os._exit(3)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    folder = Path("/tmp") / f"gr{os.getpid()}"  # Ray's socket paths must be short
    ray.init(
        "local",  # never the cluster of another test or of another user of the machine
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100_000_000,
        _temp_dir=str(folder),
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def shared(cluster: None) -> ActorGroup:
    """For tests that do not change their actors."""
    return _group()


@pytest.fixture
def make(cluster: None) -> Iterator[Callable[[], ActorGroup]]:
    made: list[ActorGroup] = []

    def one() -> ActorGroup:
        made.append(_group())
        return made[-1]

    yield one
    for group in made:
        group.kill()


def _group() -> ActorGroup:
    return ActorGroup("critic", [as_actor(Worker).options(num_cpus=0.1).remote(rank) for rank in range(2)])


async def test_calls_answer_in_rank_order(shared: ActorGroup) -> None:
    assert len(shared) == 2
    assert await shared.call(1, Worker.name, DEADLINE_S, greeting="number") == "number 1"
    assert await shared.call_all(Worker.name, DEADLINE_S) == ["rank 0", "rank 1"]


async def test_of_bulk_only_the_handle_comes_back_and_workers_fetch_it_themselves(shared: ActorGroup) -> None:
    handle, summary = await shared.call_for_bulk(0, Worker.bulk, DEADLINE_S, 5)
    assert isinstance(handle, ray.ObjectRef) and summary == 5
    alone, nothing = await shared.call_for_bulk(1, Worker.only_bulk, DEADLINE_S)
    assert isinstance(alone, ray.ObjectRef) and nothing is None
    assert await shared.call(1, Worker.rows_of, DEADLINE_S, handle) == 5
    assert await shared.call(1, Worker.rows_of, DEADLINE_S, Several([handle, alone])) == 6


async def test_an_error_of_ours_comes_back_as_itself(shared: ActorGroup) -> None:
    with pytest.raises(NonFiniteError, match="^loss is NaN$"):
        await shared.call_all(Worker.fail, DEADLINE_S, NonFiniteError("loss is NaN"))
    error = RoleError("policy", 3, "learn", "no room")
    with pytest.raises(RoleError) as caught:
        await shared.call_all(Worker.fail, DEADLINE_S, error)
    assert (caught.value.role, caught.value.rank, caught.value.operation) == ("policy", 3, "learn")


async def test_any_other_error_names_role_rank_and_operation(shared: ActorGroup) -> None:
    with pytest.raises(RoleError, match="critic rank 1 failed in 'fail': ZeroDivisionError: by zero") as caught:
        await shared.call_all(Worker.fail, DEADLINE_S, ZeroDivisionError("by zero"))
    assert type(caught.value) is RoleError


async def test_a_time_out_inside_a_worker_is_not_a_missed_deadline(shared: ActorGroup) -> None:
    with pytest.raises(RoleError, match="critic rank 1 failed in 'fail': TimeoutError: of its own") as caught:
        await shared.call_all(Worker.fail, DEADLINE_S, TimeoutError("of its own"))
    assert type(caught.value) is RoleError


async def test_a_rank_that_lost_a_peer_is_not_blamed_for_its_program(shared: ActorGroup) -> None:
    told = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    with pytest.raises(PeerLost, match="critic rank 1 failed in 'fail': RuntimeError: .*Connection closed by peer"):
        await shared.call(1, Worker.fail, DEADLINE_S, told)


async def test_what_does_not_answer_in_time_is_named(make: Callable[[], ActorGroup]) -> None:
    group = make()
    await group.call_all(Worker.name, DEADLINE_S)
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"critic rank 0 failed in 'sleep': no answer within .* 0\.3 s"):
        await group.call(0, Worker.sleep, 0.3, 300.0)
    assert time.monotonic() - started < scaled(5.0)


async def test_an_actor_that_died_is_named_now_and_later(make: Callable[[], ActorGroup]) -> None:
    group = make()
    for _ in range(2):
        with pytest.raises(RoleDied, match="critic rank 1 failed in 'die'"):
            await group.call(1, Worker.die, DEADLINE_S)
    assert await group.call(0, Worker.name, DEADLINE_S) == "rank 0"


async def test_after_kill_calls_fail_as_soon_as_the_actors_are_gone(make: Callable[[], ActorGroup]) -> None:
    group = make()
    await group.call_all(Worker.name, DEADLINE_S)
    group.kill()
    group.kill()
    with pytest.raises(RoleDied):
        async with asyncio.timeout(DEADLINE_S):
            while True:  # Ray's kill returns before the process ends
                await group.call_all(Worker.name, DEADLINE_S)


async def test_time_under_way_counts_once_however_many_calls(shared: ActorGroup) -> None:
    await shared.call_all(Worker.name, DEADLINE_S)
    shared.busy.take()
    started = time.monotonic()
    await shared.call_all(Worker.sleep, DEADLINE_S, 0.3)
    elapsed = time.monotonic() - started
    await asyncio.sleep(0.2)
    assert 0.3 <= shared.busy.take() <= elapsed
    assert shared.busy.take() == 0.0


def test_the_busy_clock_counts_overlapping_calls_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter((10.0, 14.0, 20.0, 21.0))
    monkeypatch.setattr(actors.groups.group.time, "monotonic", lambda: next(now))
    clock = BusyClock()
    with clock, clock:  # 10 to 14, once
        pass
    with clock:  # 20 to 21
        pass
    assert clock.take() == 5.0
