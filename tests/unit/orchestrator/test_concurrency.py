"""Concurrent awaitables: the original failure is raised, and nothing is left running."""

from __future__ import annotations

import asyncio

import pytest

from orchestrator.concurrency import both, cancel, together


class Worker:
    """Records how its coroutines ended."""

    def __init__(self) -> None:
        self.ended: list[tuple[str, str]] = []

    async def work(self, name: str, seconds: float, *, error: Exception | None = None) -> str:
        try:
            await asyncio.sleep(seconds)
            if error:
                raise error
        except asyncio.CancelledError:
            await asyncio.sleep(0)  # clean-up that takes an iteration of the loop
            self.ended.append((name, "cancelled"))
            raise
        self.ended.append((name, "done"))
        return name


async def test_results_come_in_the_order_of_the_work() -> None:
    worker = Worker()
    assert await together(worker.work(name, seconds) for name, seconds in (("slow", 0.02), ("fast", 0.0))) == [
        "slow",
        "fast",
    ]
    assert await together([]) == []
    assert await both(worker.work("one", 0.0), worker.work("two", 0.0)) == ("one", "two")


async def test_the_first_failure_itself_is_raised_and_the_rest_has_ended() -> None:
    worker = Worker()
    error = ValueError("first")
    with pytest.raises(ValueError, match="first") as caught:
        await together(
            [
                worker.work("long", 60.0),
                worker.work("bad", 0.01, error=error),
                worker.work("worse", 0.5, error=KeyError("second")),
            ]
        )
    assert caught.value is error
    assert sorted(worker.ended) == [("long", "cancelled"), ("worse", "cancelled")]


async def test_a_failure_after_successes_is_raised() -> None:
    worker = Worker()
    with pytest.raises(OSError, match="late"):
        await together([worker.work("early", 0.0), worker.work("late", 0.01, error=OSError("late"))])


async def test_cancelled_from_outside_it_ends_all_its_work() -> None:
    worker = Worker()
    waiting = asyncio.create_task(together([worker.work("a", 60.0), worker.work("b", 60.0)]))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert sorted(worker.ended) == [("a", "cancelled"), ("b", "cancelled")]


async def test_cancel_waits_until_work_has_ended_and_ignores_how() -> None:
    worker = Worker()
    done = asyncio.ensure_future(worker.work("done", 0.0))
    await done
    running = asyncio.ensure_future(worker.work("running", 60.0))
    await asyncio.sleep(0)
    await cancel([done, running])
    assert worker.ended == [("done", "done"), ("running", "cancelled")]
