"""Assigns actors to nodes and GPUs: a pure function of demands and nodes. Its error says what is missing.

Roles that take turns form a pool, which holds whole GPUs: rank i of each of its roles is on the pool's i-th GPU. A pool
is on one node where it fits; otherwise its GPUs, and so the ranks of its roles, are contiguous on each node. No two
actors of one role share a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from orchestrator.errors import CapacityError

Mode = Literal["colocated", "separate", "mixed"]
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Node:
    """An alive node that accepts work. `address` is its IP, which Ray also offers as resource `node:<IP>`."""

    address: str
    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True)
class Demand:
    """`count` actors of one role, each with `cpus` threads and `gpus` devices.

    Args:
        is_whole: the actors form one process group, which stays on one node where it fits.
    """

    role: str
    count: int
    cpus: float
    gpus: float = 0.0
    is_whole: bool = False

    @property
    def width(self) -> int:
        """GPUs that one actor sees."""
        return math.ceil(self.gpus)


@dataclass(frozen=True)
class Slot:
    """The place of one actor: it computes with `threads` threads and reserves `cpu_share` in Ray.

    Args:
        gpus: numbers of its GPUs among the plan's.
    """

    role: str
    rank: int
    address: str
    threads: int
    cpu_share: float
    gpus: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Args:
    gpus: the node of each GPU that the plan holds; those of a node are adjacent.
    """

    slots: Sequence[Slot]
    gpus: Sequence[str] = ()

    def of(self, role: str) -> list[Slot]:
        return [slot for slot in self.slots if slot.role == role]

    def number_on_node(self, gpu: int) -> int:
        return gpu - list(self.gpus).index(self.gpus[gpu])

    def describe(self) -> str:
        return "\n".join(
            f"{slot.role} {slot.rank}: {slot.address}, {slot.threads} threads{self._gpus(slot)}" for slot in self.slots
        )

    def _gpus(self, slot: Slot) -> str:
        numbers = ", ".join(str(self.number_on_node(gpu)) for gpu in slot.gpus)
        return f", GPU {numbers}" if numbers else ""


def place(demands: Sequence[Demand], nodes: Sequence[Node], *, mode: Mode) -> Plan:
    """Places the largest actors first.

    colocated: all roles take turns, so each must fit alone. separate: all actors compute at the same time, so all must
    fit together. mixed: all roles but the engines take turns.

    Raises:
        CapacityError: says which role does not fit, what it needs and what the cluster has.
    """
    order = sorted(demands, key=_size)
    room = _Room(nodes)
    slots: list[Slot] = []
    for pool in _pools(order, mode):
        try:
            slots += room.place(pool)
        except _TooSmall as error:
            raise CapacityError(_shortage(error.demand, demands, nodes, mode)) from None
    return Plan(*_numbered(slots, room.held))


def _size(demand: Demand) -> tuple[float, float, int, str]:
    """Sorts the largest first: of groups on GPUs that with the most actors, so that it finds a whole node."""
    return -demand.gpus, -demand.cpus, -demand.count if demand.gpus else 0, demand.role


def _pools(order: Sequence[Demand], mode: Mode) -> list[list[Demand]]:
    if mode == "separate":
        return [[demand] for demand in order]
    engines = [demand for demand in order if demand.role == "rollout" and mode == "mixed"]
    others = [demand for demand in order if demand not in engines]
    pools = [pool for pool in (engines, others) if pool]
    return sorted(pools, key=lambda pool: order.index(pool[0]))


def in_turn(roles: Collection[str], mode: Mode) -> frozenset[str]:
    """Those of some roles on GPUs that take turns there. Engines do so with models that share their GPUs."""
    pools = _pools([Demand(role, 1, 0.0, 1.0) for role in roles], mode) if mode != "separate" else []
    together = [{demand.role for demand in pool} for pool in pools]
    return frozenset().union(*(pool for pool in together if pool - {"rollout"}))


def _numbered(slots: Sequence[Slot], held: Sequence[_Gpu]) -> tuple[tuple[Slot, ...], tuple[str, ...]]:
    """The slots with their GPUs numbered among those that are used, and the nodes of these."""
    used = [number for number, gpu in enumerate(held) if gpu.is_used]
    new = {old: number for number, old in enumerate(used)}
    renumbered = tuple(replace(slot, gpus=tuple(new[gpu] for gpu in slot.gpus)) for slot in slots)
    return renumbered, tuple(held[number].address for number in used)


class _TooSmall(Exception):
    def __init__(self, demand: Demand) -> None:
        self.demand = demand


@dataclass
class _Gpu:
    address: str
    free: float = 1.0
    is_used: bool = False


class _Room:
    """What is left on the nodes.

    Args:
        held: all GPUs of the nodes.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._nodes = nodes
        self.held = [_Gpu(node.address) for node in nodes for _ in range(int(node.gpus))]
        self._cpus = dict.fromkeys((node.address for node in nodes), 0.0)  # taken by earlier pools
        self._load = dict.fromkeys((node.address for node in nodes), 0.0)  # CPUs of all actors

    def place(self, pool: Sequence[Demand]) -> list[Slot]:
        """The slots of roles that take turns. Raises _TooSmall."""
        most = dict(self._cpus)
        chosen = self._gpus_for([demand for demand in pool if demand.gpus])
        slots: list[Slot] = []
        for demand in pool:
            used = dict(self._cpus)
            threads, share = max(1, int(demand.cpus)), demand.cpus / len(pool)
            for rank, (address, gpus) in enumerate(self._places(demand, chosen, used)):
                slots.append(Slot(demand.role, rank, address, threads, share, gpus))
            most = {address: max(most[address], used[address]) for address in most}
        self._cpus = most
        for number in {number for slot in slots for number in slot.gpus}:
            self.held[number].free -= _amount(pool)
            self.held[number].is_used = True
        return slots

    def _places(
        self, demand: Demand, chosen: Mapping[str, Sequence[int]], used: dict[str, float]
    ) -> list[tuple[str, tuple[int, ...]]]:
        """(node, GPUs) of each actor; adds its CPUs to `used`."""
        found = _on_gpus(demand, chosen) if demand.gpus else []
        if not demand.gpus and demand.is_whole and (address := self._whole(demand, used)):
            found = [(address, ())] * demand.count
        places = []
        for rank in range(demand.count):
            if rank < len(found):
                place = found[rank]
            elif not demand.gpus and (node := self._least_loaded(demand, used)):
                place = node.address, ()
            else:
                raise _TooSmall(demand)
            used[place[0]] += demand.cpus
            self._load[place[0]] += demand.cpus
            places.append(place)
        return sorted(places, key=lambda place: place[0]) if demand.is_whole and not demand.gpus else places

    def _gpus_for(self, pool: Sequence[Demand]) -> dict[str, list[int]]:
        """GPUs by node, for all roles of a pool: on the fullest node that holds them all, or on as few as possible."""
        if not pool:
            return {}
        amount = _amount(pool) - _ROUNDING
        block = max(demand.width for demand in pool)
        needed = max(demand.count * demand.width for demand in pool)
        fitting: dict[str, list[int]] = {}
        for node in self._nodes:
            left = node.cpus - self._cpus[node.address]
            most = min(int(left / demand.cpus + _ROUNDING) * demand.width for demand in pool)
            gpus = [i for i, gpu in enumerate(self.held) if gpu.address == node.address and gpu.free >= amount]
            num_used = min(len(gpus), most)
            fitting[node.address] = gpus[: num_used - num_used % block]
        whole = [address for address, gpus in fitting.items() if len(gpus) >= needed]
        if whole:
            best = min(whole, key=lambda address: (self._num_free(address), self._load[address], address))
            return {best: fitting[best][:needed]}
        chosen: dict[str, list[int]] = {}
        for address in sorted(fitting, key=lambda address: (-len(fitting[address]), address)):
            chosen[address] = fitting[address][: max(needed, 0)]
            needed -= len(chosen[address])
        if needed > 0:
            raise _TooSmall(max(pool, key=lambda demand: demand.count * demand.width))
        return chosen

    def _num_free(self, address: str) -> float:
        return sum(gpu.free for gpu in self.held if gpu.address == address)

    def _whole(self, demand: Demand, used: Mapping[str, float]) -> str | None:
        """The least loaded node on which a whole process group fits. None: there is none."""
        node = self._least_loaded(Demand(demand.role, 1, demand.cpus * demand.count), used)
        return node.address if node else None

    def _least_loaded(self, demand: Demand, used: Mapping[str, float]) -> Node | None:
        """The node for one actor without a GPU; one that has no GPUs is preferred."""
        fitting = [node for node in self._nodes if used[node.address] + demand.cpus <= node.cpus]

        def load(node: Node) -> tuple[float, float, str]:
            num_free = self._num_free(node.address)
            return (
                1.0 - num_free / node.gpus if node.gpus else 0.0,
                self._load[node.address] / node.cpus,
                node.address,
            )

        return min([node for node in fitting if not node.gpus] or fitting, key=load, default=None)


def _amount(pool: Sequence[Demand]) -> float:
    """The part of a GPU that a pool holds: all of it if roles take turns."""
    return min(pool[0].gpus, 1.0) if len(pool) == 1 else 1.0


def _on_gpus(demand: Demand, chosen: Mapping[str, Sequence[int]]) -> list[tuple[str, tuple[int, ...]]]:
    """Places of a role's actors on a pool's GPUs, in order; too few if an actor would be split over nodes."""
    width = demand.width
    return [
        (address, tuple(gpus[start : start + width]))
        for address, gpus in chosen.items()
        for start in range(0, len(gpus) - width + 1, width)
    ]


def _shortage(demand: Demand, demands: Sequence[Demand], nodes: Sequence[Node], mode: Mode) -> str:
    wanted = sum(max(d.count * d.width for d in pool) for pool in _pools(sorted(demands, key=_size), mode))
    kind = "GPUs" if demand.gpus and sum(int(node.gpus) for node in nodes) < wanted else "CPUs"
    offered = ", ".join(f"{node.address}: {node.cpus:g} CPUs, {node.gpus:g} GPUs" for node in nodes) or "no nodes"
    each = f"{demand.cpus:g} CPUs and {demand.gpus:g} GPUs"
    together = (
        f" All roles together need {sum(d.cpus * d.count for d in demands):g} CPUs and "
        f"{sum(d.gpus * d.count for d in demands):g} GPUs; with placement.mode=colocated they share."
        if mode == "separate"
        else ""
    )
    return (
        f"too few {kind}: role {demand.role} wants {demand.count} × ({each}), the cluster offers {offered}.{together} "
        f"Add nodes, or lower the number or size of {demand.role}'s actors in the config."
    )
