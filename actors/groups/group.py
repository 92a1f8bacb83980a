"""Groups of Ray actors that serve one role. The only module that uses `.remote`.

A call takes the worker's method itself (`group.call(0, PolicyWorker.save, path)`) and has a deadline. It returns the
method's result, or raises the RlhfError that the worker raised, or a RoleError that names role, rank and method.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from actors.groups.process import Process, Whereabouts
from actors.groups.ray_errors import translated
from orchestrator.concurrency import together
from orchestrator.errors import DeadlineExceeded
from orchestrator.types import Handle

R = TypeVar("R")
_ANY_KEY = "section deadlines of the config"
_KEYS = {
    "ready": "deadlines.start_s, and a minute per GiB of the largest model; if loading takes longer, raise it, or copy "
    "the model to the nodes' disks"
}
Start = Callable[[Sequence[int]], Awaitable[Mapping[int, ActorHandle[Any]]]]


@dataclass
class BusyClock:
    """Seconds with at least one pending call."""

    _under_way: int = 0
    _since: float = 0.0
    _seconds: float = 0.0

    def __enter__(self) -> None:
        if not self._under_way:
            self._since = time.monotonic()
        self._under_way += 1

    def __exit__(self, *_: object) -> None:
        self._under_way -= 1
        if not self._under_way:
            self._seconds += time.monotonic() - self._since

    def take(self) -> float:
        """Seconds since the last `take`."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


@dataclass(frozen=True, eq=False)
class Call:
    """One pending call."""

    role: str
    rank: int
    operation: str
    deadline_s: float
    started: float = field(default_factory=time.monotonic)


@dataclass(eq=False)
class ActorGroup:
    """The actors of one role, rank by rank.

    Args:
        start: starts new actors for these ranks.
        is_whole: the ranks form one process group, so that replacing one requires replacing all.
        starts_alone: the actors need their GPUs empty while they start.
    """

    role: str
    actors: list[ActorHandle[Any]]
    start: Start | None = None
    is_whole: bool = False
    starts_alone: bool = False
    busy: BusyClock = field(default_factory=BusyClock)
    under_way: set[Call] = field(default_factory=set)
    whereabouts: dict[int, Whereabouts] = field(default_factory=dict)
    births: dict[int, int] = field(default_factory=dict)
    """By rank, the number of replacements of the first actor."""

    def __len__(self) -> int:
        return len(self.actors)

    async def await_ready(self, deadline_s: float, ranks: Sequence[int] | None = None) -> None:
        """Waits until constructors (None: all) have finished. Raises the first error."""
        ranks = range(len(self)) if ranks is None else ranks
        found = await together(self.call(rank, Process.ready, deadline_s) for rank in ranks)
        self.whereabouts.update(zip(ranks, found, strict=True))
        self.busy.take()

    def restarted_with(self, rank: int) -> Sequence[int]:
        """The ranks that are replaced together with this one."""
        return range(len(self)) if self.is_whole else [rank]

    async def renew(self, ranks: Sequence[int], deadline_s: float) -> None:
        """Replaces these actors; returns when the new ones are ready."""
        if self.start is None:
            raise ValueError(f"the group {self.role} has no function to restart actors")
        for rank in ranks:
            self._kill(rank)
            self.births[rank] = self.births.get(rank, 0) + 1
            self.whereabouts.pop(rank, None)
        for rank, actor in (await self.start(ranks)).items():
            self.actors[rank] = actor
        await self.await_ready(deadline_s, ranks)

    async def call(self, rank: int, method: Callable[..., R], deadline_s: float, *args: Any, **kwargs: Any) -> R:
        """Awaits one method of one actor."""
        reference = self.actors[rank].serve.remote(method.__name__, args, kwargs)
        result: R = await self._result(rank, method.__name__, reference, deadline_s)
        return result

    async def call_all(self, method: Callable[..., R], deadline_s: float, *args: Any, **kwargs: Any) -> list[R]:
        """Awaits the same method on all ranks. Returns the results in rank order."""
        return await together(self.call(rank, method, deadline_s, *args, **kwargs) for rank in range(len(self)))

    async def call_for_bulk(
        self, rank: int, method: Callable[..., Any], deadline_s: float, *args: Any, **kwargs: Any
    ) -> tuple[Handle, Any]:
        """Awaits a method that returns bulk, or (bulk, summary). Returns a handle to the bulk instead of the bulk
        itself."""
        handle, summary = self.actors[rank].serve_bulk.options(num_returns=2).remote(method.__name__, args, kwargs)
        return handle, await self._result(rank, method.__name__, summary, deadline_s)

    async def _result(self, rank: int, operation: str, reference: Any, deadline_s: float) -> Any:
        try:
            with self.busy, self._noted(Call(self.role, rank, operation, deadline_s)):
                return await asyncio.wait_for(reference, deadline_s)
        except RayError as error:  # before TimeoutError: an error raised by a worker has both classes
            raise translated(error, self.role, rank, operation) from error
        except TimeoutError:
            cause = f"no answer within its deadline of {deadline_s:g} s ({_KEYS.get(operation, _ANY_KEY)})"
            raise DeadlineExceeded(self.role, rank, operation, cause) from None

    def waiting(self) -> list[dict[str, Any]]:
        """The pending calls, for a heartbeat."""
        now = time.monotonic()
        return [
            {
                "role": call.role,
                "rank": call.rank,
                "operation": call.operation,
                "seconds": now - call.started,
                "deadline_s": call.deadline_s,
            }
            for call in self.under_way
        ]

    @contextlib.contextmanager
    def _noted(self, call: Call) -> Iterator[None]:
        self.under_way.add(call)
        try:
            yield
        finally:
            self.under_way.discard(call)

    def kill(self) -> None:
        """Ends all actors at once."""
        for rank in range(len(self)):
            self._kill(rank)

    def _kill(self, rank: int) -> None:
        with contextlib.suppress(RayError):
            ray.kill(self.actors[rank])
