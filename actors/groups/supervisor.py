"""Executes the decisions of orchestrator/failures.py: collects evidence, restarts processes, reports actions."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

from actors.groups.group import ActorGroup
from actors.groups.inspection import Evidence, inspect, kill
from actors.groups.starter import Starter
from orchestrator.concurrency import cancel, together
from orchestrator.errors import DeadlineExceeded, PeerLost, RlhfError, RoleDied, RoleError
from orchestrator.failures import ANSWERABLE, LEARNERS, Action, Failure, FailurePolicy
from orchestrator.watching.telemetry import Telemetry

T = TypeVar("T")


class RaySupervisor:
    """Supervises the groups of one starter.

    Args:
        run: the run's folder; stacks go to its sub-folder `stacks`.
        start_s: deadline of an actor's start.
    """

    def __init__(
        self,
        starter: Starter,
        policy: FailurePolicy,
        telemetry: Telemetry,
        say: Callable[[str], None],
        *,
        run: Path,
        start_s: float,
    ) -> None:
        self._starter, self._policy, self._telemetry, self._say = starter, policy, telemetry, say
        self._run, self._start_s = run, start_s
        self._before: list[Failure] = []
        self._repair = asyncio.Lock()
        self._judged: tuple[RlhfError, Action] | None = None

    async def keep(
        self,
        group: ActorGroup,
        work: Callable[[], Awaitable[T]],
        prepare: Callable[[], Awaitable[Any]] | None = None,
    ) -> T:
        """Awaits `work` of a stateless group. Restarts actors that fail, and repeats the call.

        Args:
            prepare: awaited after a restart, before `work` is repeated.

        Raises:
            RlhfError: an error of another role, or one after which this does not restart actors.
        """
        is_new = False
        while True:
            seen = dict(group.births)
            try:
                if is_new and prepare is not None:
                    await prepare()
                return await work()
            except RoleError as error:
                if error.role != group.role:
                    raise
                await self.restart(group, error, seen)
                is_new = True

    async def restart(self, group: ActorGroup, error: RoleError, seen: Mapping[int, int]) -> None:
        """Restarts the failed actor, unless it was restarted since `seen`. Raises `error` if nothing is to be
        restarted.

        Args:
            seen: the group's `births` before the call that failed.
        """
        async with self._repair:
            if group.births.get(error.rank) != seen.get(error.rank):
                return
            action = await self._judge(error, group, asks_again=True)
            if action is not Action.RESTART_ACTOR:
                raise error
            started = monotonic()
            await self._start_anew({group.role: group.restarted_with(error.rank)})
            self._recovered(action, started)

    async def until_done(self, work: Callable[[], Awaitable[T]]) -> T:
        """See orchestrator.failures.Supervisor."""
        while True:
            try:
                return await work()
            except ANSWERABLE as error:
                failure: RlhfError = error
            async with self._repair:
                await self._recover(failure)

    async def _recover(self, failure: RlhfError) -> None:
        while True:
            action = await self._judge(failure, self._group_of(failure), asks_again=False)
            started = monotonic()
            try:
                if action is Action.RESTART_LEARNERS:
                    learners = [group for group in self._starter.groups if group.role in LEARNERS]
                    await self._start_anew({group.role: range(len(group)) for group in learners})
                elif action is Action.PLACE_AGAIN:
                    await self._place_again()
                else:
                    raise failure
            except ANSWERABLE as error:
                if error is failure:
                    raise
                failure = error
                continue
            return self._recovered(action, started)

    async def _start_anew(self, ranks: Mapping[str, Sequence[int]]) -> None:
        """Replaces the processes of these ranks, by role. SIGKILL ends the old ones, even stopped ones."""
        groups = [group for group in self._starter.groups if group.role in ranks]
        await kill(
            [process for group in groups for rank, process in group.whereabouts.items() if rank in ranks[group.role]]
        )
        await self._while_placed(together(group.renew(ranks[group.role], self._start_s) for group in groups))

    async def _while_placed(self, start: Coroutine[Any, Any, Any]) -> None:
        """Awaits a start. Detects lost nodes, whose actors are never ready, before Ray reports them.

        Raises:
            RoleDied: a node of the plan was lost.
        """
        starting = asyncio.ensure_future(start)
        try:
            while not starting.done():
                await asyncio.wait([starting], timeout=1.0)
                if not starting.done() and not self._starter.is_placed():
                    raise RoleDied("node", 0, "start", "a node of the placement plan is gone")
            await starting
        finally:
            await cancel([starting])

    async def _place_again(self) -> None:
        await kill([process for group in self._starter.groups for process in group.whereabouts.values()])
        await self._starter.place_again(self._start_s)
        self._telemetry.event("placed", plan=self._starter.plan.describe().splitlines())
        self._say("placement:\n  " + self._starter.plan.describe().replace("\n", "\n  "))

    async def _judge(self, error: RlhfError, group: ActorGroup | None, *, asks_again: bool) -> Action:
        """Decides, once for each failure, and reports the failure with the evidence."""
        if self._judged is not None and self._judged[0] is error:
            return self._judged[1]
        failure = Failure.of(error, self._step())
        await self._tell(error, failure, group)
        is_placed = self._starter.is_placed()
        action = self._policy.decide(failure, self._before, is_placed=is_placed, asks_again=asks_again)
        used, budget = self._policy.used(failure, self._before), self._policy.budgets[failure.category]
        self._before.append(failure)
        self._judged = (error, action)
        if action is Action.GIVE_UP:
            reason = f"failures.{failure.category}={budget} of {self._policy.window_steps} steps are used up"
            self._telemetry.event("gave_up", reason=reason)
        else:
            self._telemetry.event("recovery", action=action.value, roles=[failure.role], used=used + 1, budget=budget)
            self._say(f"{error}; {action.value} ({used + 1} of {budget} {failure.category} failures)")
        return action

    async def _tell(self, error: RlhfError, failure: Failure, group: ActorGroup | None) -> None:
        rank = error.rank if isinstance(error, RoleError) else 0
        stacks = None
        evidence: dict[int, Evidence] = {}
        process = None
        if group is not None:
            wants_stacks = isinstance(error, DeadlineExceeded)
            ranks = range(len(group)) if isinstance(error, (DeadlineExceeded, PeerLost)) else [rank]
            found = await together(inspect(group.whereabouts.get(item), stacks=wants_stacks) for item in ranks)
            evidence = dict(zip(ranks, found, strict=True))
            # In a collective all ranks wait for a stopped rank or report a dead one.
            innocent = ("running", "gone") if wants_stacks else ("running",)
            rank = next((item for item in ranks if evidence[item].state not in innocent), rank)
            process = group.whereabouts.get(rank)
            stacks = self._write_stacks(error, evidence) if wants_stacks else None
        seen = evidence.get(rank, Evidence(""))
        self._telemetry.event(
            "failure",
            role=failure.role,
            rank=rank,
            operation=getattr(error, "operation", ""),
            error=type(error).__name__,
            category=failure.category,
            cause=str(error),
            node=process.address if process else None,
            pid=process.pid if process else None,
            exit=seen.state,
            log=list(seen.log),
            stacks=stacks,
            step=failure.step,
        )
        if stacks is not None:
            self._say(f"{failure.role} rank {rank} ({seen.state}) missed its deadline; stacks: {stacks}")

    def _write_stacks(self, error: RlhfError, evidence: dict[int, Evidence]) -> str:
        folder = self._run / "stacks"
        parts = [f"rank {rank}: {item.state}\n{item.stacks}\n" for rank, item in evidence.items()]
        try:
            folder.mkdir(exist_ok=True)
            name = f"{len(list(folder.iterdir())) + 1:03d}-{getattr(error, 'role', 'role')}.txt"
            (folder / name).write_text(f"{error}\n\n" + "\n".join(parts), encoding="utf-8")
        except OSError as problem:  # a full disk must not hide the original failure
            return f"not kept, {folder} can't be written ({problem.strerror})"
        return f"stacks/{name}"

    def _step(self) -> int:
        return self._telemetry.now()["step"] or 0

    def _group_of(self, error: RlhfError) -> ActorGroup | None:
        role = error.role if isinstance(error, RoleError) else None
        return next((group for group in self._starter.groups if group.role == role), None)

    def _recovered(self, action: Action, started: float) -> None:
        seconds = monotonic() - started
        self._telemetry.event("recovered", action=action.value, seconds=seconds, step=self._step())
        self._say(f"{action.value}: done in {seconds:.1f} s")
