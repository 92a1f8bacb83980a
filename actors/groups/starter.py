"""Starts and restarts groups of actors according to the placement plan."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.groups.cluster import alive_nodes, bundles, environment, plan_when_ready, requested_cpus, reserve
from actors.groups.devices import device_names, visible
from actors.groups.group import ActorGroup, Start
from actors.groups.process import as_actor, free_port
from actors.learning.distributed import Group
from orchestrator.concurrency import together
from orchestrator.errors import RoleDied
from orchestrator.planning.placement import Demand, Plan, Slot

PORT_DEADLINE_S = 60.0
CLOSE_S = 5.0

Arguments = Callable[[Slot], Mapping[str, Any]]


class Starter:
    """The groups of one stage, on one reservation.

    Args:
        wait_s: time limit for nodes and their resources.
        collective_s: deadline of each collective of a process group.
        tell: gets a line for the console while the starter waits.
    """

    def __init__(
        self,
        needed: Sequence[Demand],
        *,
        mode: Any,
        wait_s: float,
        collective_s: float,
        tell: Callable[[str], None],
    ) -> None:
        self._needed, self._mode, self._wait_s, self._collective_s = needed, mode, wait_s, collective_s
        self._tell = tell
        self._groups: list[ActorGroup] = []
        self._reservation: PlacementGroup | None = None
        self._devices: Mapping[int, str] = {}
        self.plan = Plan(())

    @property
    def groups(self) -> Sequence[ActorGroup]:
        return self._groups

    async def place(self) -> None:
        """Plans and reserves.

        Raises:
            CapacityError: the cluster is too small, or does not free the planned resources in time.
        """
        self.plan = await plan_when_ready(self._needed, mode=self._mode, wait_s=self._wait_s, tell=self._tell)
        self._reservation = await reserve(self.plan, wait_s=self._wait_s, tell=self._tell)
        self._devices = await device_names(self.plan, self._reservation)

    async def place_again(self, deadline_s: float) -> None:
        """Ends all actors and starts the same number on the present nodes; returns when they are ready.

        Raises:
            CapacityError: as `place`.
            RoleError: an actor did not start.
        """
        self.close()
        await self.place()
        for alone in (True, False):
            groups = [group for group in self._groups if group.starts_alone == alone]
            await together(group.renew(range(len(group)), deadline_s) for group in groups)

    def is_placed(self) -> bool:
        """Whether all nodes of the plan are alive."""
        alive = {node.address for node in alive_nodes()}
        return all(slot.address in alive for slot in self.plan.slots)

    def close(self) -> None:
        """Ends all actors and frees the reservation. If the cluster is gone, Ray's calls block for a minute each, so
        nothing waits for them longer than CLOSE_S."""
        reservation, self._reservation = self._reservation, None

        def close() -> None:
            for group in self._groups:
                group.kill()
            if reservation is not None:
                remove_placement_group(reservation)

        closing = threading.Thread(target=close, name="close-groups", daemon=True)
        closing.start()
        closing.join(CLOSE_S)

    async def group(
        self, role: str, worker: type[Any], arguments: Arguments, *, starts_alone: bool = False
    ) -> ActorGroup:
        """Starts independent actors; returns before their constructors finish."""

        async def start(ranks: Sequence[int]) -> Mapping[int, ActorHandle[Any]]:
            slots = self.plan.of(role)
            return {rank: self._actor(slots[rank], worker, arguments(slots[rank])) for rank in ranks}

        return await self._started(role, start, is_whole=False, starts_alone=starts_alone)

    async def ranks(self, role: str, worker: type[Any], arguments: Mapping[str, Any]) -> ActorGroup:
        """Starts actors whose ranks form one process group; returns before their constructors finish."""

        async def start(ranks: Sequence[int]) -> Mapping[int, ActorHandle[Any]]:
            slots = self.plan.of(role)
            address, port = await self._rendezvous(slots)
            groups = [
                Group(
                    rank=slot.rank,
                    world_size=len(slots),
                    master_addr=address,
                    master_port=port,
                    timeout_s=self._collective_s,
                    threads=slot.threads,
                )
                for slot in slots
            ]
            return {rank: self._actor(slots[rank], worker, {**arguments, "group": groups[rank]}) for rank in ranks}

        return await self._started(role, start, is_whole=True)

    async def _started(self, role: str, start: Start, *, is_whole: bool, starts_alone: bool = False) -> ActorGroup:
        ranks = range(len(self.plan.of(role)))
        started = await start(ranks)
        group = ActorGroup(role, [started[rank] for rank in ranks], start, is_whole=is_whole, starts_alone=starts_alone)
        self._groups.append(group)
        return group

    def _actor(self, slot: Slot, worker: type[Any], arguments: Mapping[str, Any]) -> ActorHandle[Any]:
        devices = [self._devices[number] for number in slot.gpus]
        options = {
            "num_cpus": requested_cpus(slot),
            "scheduling_strategy": self._at(slot),
            "runtime_env": {"env_vars": environment(slot.threads, on_gpu=bool(devices)) | visible(devices)},
            "max_restarts": 0,
        }
        return as_actor(worker).options(**options).remote(**arguments)

    async def _rendezvous(self, slots: Sequence[Slot]) -> tuple[str, int]:
        """Address and free port on the node of rank 0, where the ranks meet. A group of one needs no port.

        Raises:
            RoleDied: that node does not answer.
        """
        first, *others = slots
        if not others:
            return first.address, 0
        asked = ray.remote(free_port).options(num_cpus=requested_cpus(first), scheduling_strategy=self._at(first))
        port = asked.remote()
        try:
            return first.address, await asyncio.wait_for(port, PORT_DEADLINE_S)
        except (TimeoutError, RayError) as error:
            cause = f"the node {first.address} of rank 0 named no port within {PORT_DEADLINE_S:g} s: {error!r}"
            raise RoleDied(first.role, 0, "start", cause) from error

    def _at(self, slot: Slot) -> PlacementGroupSchedulingStrategy:
        (index,) = (number for number, bundle in enumerate(bundles(self.plan)) if slot in bundle.slots)
        return PlacementGroupSchedulingStrategy(self._reservation, index)


@asynccontextmanager
async def placed(
    needed: Sequence[Demand], *, mode: Any, wait_s: float, collective_s: float, tell: Callable[[str], None]
) -> AsyncIterator[Starter]:
    """Yields a starter. On exit all actors have ended and their resources are free."""
    starter = Starter(needed, mode=mode, wait_s=wait_s, collective_s=collective_s, tell=tell)
    try:
        await starter.place()
        yield starter
    finally:
        starter.close()
