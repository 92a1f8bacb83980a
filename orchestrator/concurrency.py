"""Runs several awaitables concurrently."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


async def together(work: Iterable[Awaitable[T]]) -> list[T]:
    """Awaits all. On the first failure it cancels the rest, waits for them to end, and raises that failure.

    Unlike `asyncio.gather` it leaves nothing running; unlike `TaskGroup` it raises no ExceptionGroup.
    """
    tasks = [asyncio.ensure_future(item) for item in work]
    if not tasks:
        return []
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        return [await task for task in _failed_first(tasks)]
    finally:
        await cancel(tasks)


def _failed_first(tasks: Sequence[asyncio.Future[T]]) -> Sequence[asyncio.Future[T]]:
    failed = [task for task in tasks if task.done() and not task.cancelled() and task.exception()]
    return failed or tasks


async def cancel(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancels unfinished tasks and waits for them to end. Ignores their failures."""
    pending = [task for task in tasks if not task.done()]
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)


async def both(first: Coroutine[Any, Any, T], second: Coroutine[Any, Any, T]) -> tuple[T, T]:
    """Awaits two coroutines of the same type concurrently."""
    one, two = await together([first, second])
    return one, two
