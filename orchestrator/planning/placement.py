"""Assigns actors to nodes: a pure function of demands and nodes. Its error says what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from orchestrator.errors import CapacityError


@dataclass(frozen=True)
class Node:
    """An alive node that accepts work. `address` is its IP, which Ray also offers as resource `node:<IP>`."""

    address: str
    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True)
class Demand:
    """`count` actors of one role, each with `cpus` threads and `gpus` devices."""

    role: str
    count: int
    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True)
class Slot:
    """The place of one actor: it computes with `threads` threads and reserves the shares in Ray."""

    role: str
    rank: int
    address: str
    threads: int
    cpu_share: float
    gpu_share: float


@dataclass(frozen=True)
class Plan:
    slots: Sequence[Slot]

    def of(self, role: str) -> list[Slot]:
        return [slot for slot in self.slots if slot.role == role]

    def describe(self) -> str:
        lines = [f"{slot.role} {slot.rank}: {slot.address}, {slot.threads} threads{_gpus(slot)}" for slot in self.slots]
        return "\n".join(lines)


def place(demands: Sequence[Demand], nodes: Sequence[Node], *, mode: Literal["colocated", "separate"]) -> Plan:
    """Places the largest actors first, each on the least loaded node with enough room.

    colocated: roles take turns, so each role must fit alone; an actor reserves a part of a shared device. separate: all
    actors compute at the same time, so all must fit together.

    Raises:
        CapacityError: says which role does not fit, what it needs and what the cluster has.
    """
    order = sorted(demands, key=lambda demand: (-demand.gpus, -demand.cpus, demand.role))
    num_sharing = len(demands) if mode == "colocated" else 1
    used_by_all = {node.address: _Load() for node in nodes}
    slots = []
    for demand in order:
        used = {node.address: _Load() for node in nodes} if mode == "colocated" else used_by_all
        for rank in range(demand.count):
            node = _least_loaded(demand, nodes, used, used_by_all)
            if node is None:
                raise CapacityError(_shortage(demand, demands, nodes, mode))
            used[node.address].add(demand)
            if mode == "colocated":
                used_by_all[node.address].add(demand)
            threads = max(1, int(demand.cpus))
            slots.append(
                Slot(demand.role, rank, node.address, threads, demand.cpus / num_sharing, demand.gpus / num_sharing)
            )
    return Plan(tuple(slots))


@dataclass
class _Load:
    cpus: float = 0.0
    gpus: float = 0.0

    def add(self, demand: Demand) -> None:
        self.cpus += demand.cpus
        self.gpus += demand.gpus


def _least_loaded(
    demand: Demand, nodes: Sequence[Node], used: dict[str, _Load], used_by_all: dict[str, _Load]
) -> Node | None:
    fitting = [
        node
        for node in nodes
        if used[node.address].cpus + demand.cpus <= node.cpus and used[node.address].gpus + demand.gpus <= node.gpus
    ]
    without_spare_gpus = [node for node in fitting if not node.gpus] if not demand.gpus else []

    def load(node: Node) -> tuple[float, float, str]:
        total = used_by_all[node.address]
        return (total.gpus / node.gpus if node.gpus else 0.0, total.cpus / node.cpus, node.address)

    return min(without_spare_gpus or fitting, key=load, default=None)


def _shortage(demand: Demand, demands: Sequence[Demand], nodes: Sequence[Node], mode: str) -> str:
    kind = "GPUs" if demand.gpus and sum(n.gpus for n in nodes) < demand.gpus * demand.count else "CPUs"
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


def _gpus(slot: Slot) -> str:
    return f", {slot.gpu_share:g} GPU" if slot.gpu_share else ""
