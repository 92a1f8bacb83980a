"""`python -m benchmarks.placements`: where the actors of several placements run, on Ray clusters with fake GPUs.

Each actor is asked for its node and for the GPUs that it sees. The actors load no models; their places come from the
same plan, reservation and start as those of a run. Shows a table, in Markdown.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray.cluster_utils import Cluster

from actors.groups.starter import Starter, placed
from orchestrator.errors import CapacityError
from orchestrator.planning.demands import RECORDER_CPUS
from orchestrator.planning.placement import Demand, Mode

SECOND_ADDRESS = "127.0.0.2"  # of this machine too, so that Ray has two nodes
ANSWER_S = 300.0
_CPUS_PER_NODE, _CPUS_PER_ACTOR = 8, 0.5
_MODELS = ("policy", "critic", "reference", "reward")
_GROUPS = ("policy", "critic", "reference")


@dataclass(frozen=True)
class Found:
    """What one actor reports: its node and the value of CUDA_VISIBLE_DEVICES."""

    role: str
    rank: int
    node: str
    devices: str


class Scout:
    """An actor without a model."""

    def devices(self) -> str:
        return os.environ.get("CUDA_VISIBLE_DEVICES", "all")


def demands(counts: Mapping[str, int], *, engine_width: int = 1) -> list[Demand]:
    """Actors of the roles with GPUs, and a recorder without."""
    sizes = {role: float(engine_width if role == "rollout" else 1) for role in counts}
    return [
        *(Demand(role, counts[role], _CPUS_PER_ACTOR, sizes[role], is_whole=role in _GROUPS) for role in counts),
        Demand("recorder", 1, RECORDER_CPUS),
    ]


@contextmanager
def fake_gpus(num_nodes: int, gpus_per_node: int) -> Iterator[None]:
    """A Ray of one or two nodes on this machine that claim to have GPUs."""
    node = {"num_cpus": _CPUS_PER_NODE, "num_gpus": gpus_per_node, "object_store_memory": 80_000_000}
    settings = {"prestart_worker_first_driver": False, "enable_worker_prestart": False}
    cluster = Cluster(
        initialize_head=True, head_node_args={**node, "include_dashboard": False, "_system_config": settings}
    )
    try:
        if num_nodes > 1:
            cluster.add_node(**node, node_ip_address=SECOND_ADDRESS)
        ray.init(address=cluster.address, log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


async def found(needed: Sequence[Demand], mode: Mode) -> list[Found]:
    """What the actors of a placement report. Raises CapacityError if they do not fit."""
    async with placed(needed, mode=mode, wait_s=20.0, collective_s=60.0, tell=_tell) as starter:
        return [line for demand in needed for line in await _of(demand.role, starter)]


async def _of(role: str, starter: Starter) -> list[Found]:
    group = await starter.group(role, Scout, lambda slot: {})
    await group.await_ready(ANSWER_S)
    devices = await group.call_all(Scout.devices, ANSWER_S)
    lines = [Found(role, rank, group.whereabouts[rank].address, seen) for rank, seen in enumerate(devices)]
    group.kill()
    return lines


def _tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")


_EVERY: Mapping[tuple[int, int], Mapping[Mode, Sequence[Demand]]] = {
    (1, 1): {
        "colocated": demands(dict.fromkeys((*_MODELS, "rollout"), 1)),
        "separate": demands(dict.fromkeys((*_MODELS, "rollout"), 1)),
        "mixed": demands(dict.fromkeys((*_MODELS, "rollout"), 1)),
    },
    (1, 8): {
        "colocated": demands({"policy": 8, "critic": 8, "reference": 8, "reward": 8, "rollout": 8}),
        "separate": demands({"policy": 2, "critic": 2, "reference": 1, "reward": 1, "rollout": 2}),
        "mixed": demands({"policy": 4, "critic": 4, "reference": 4, "reward": 4, "rollout": 2}, engine_width=2),
    },
    (2, 8): {
        "colocated": demands({"policy": 16, "critic": 16, "reference": 16, "reward": 2, "rollout": 8}, engine_width=2),
        "separate": demands({"policy": 4, "critic": 2, "reference": 1, "reward": 1, "rollout": 8}),
        "mixed": demands({"policy": 8, "critic": 8, "reference": 8, "reward": 8, "rollout": 8}),
    },
}


def rows(lines: Sequence[Found], nodes: Sequence[str]) -> Iterator[str]:
    """A Markdown row per role: on each node, ranks and the GPUs that they see."""
    for role in dict.fromkeys(line.role for line in lines):
        cells = []
        for node in nodes:
            there = [line for line in lines if line.role == role and line.node == node]
            ranks = f"{there[0].rank} to {there[-1].rank}" if len(there) > 1 else "".join(str(x.rank) for x in there)
            seen = " ".join(line.devices.replace(",", "+") or "none" for line in there)
            cells.append(f"{ranks}: {seen}" if there else "")
        yield f"| {role} | {' | '.join(cells)} |"


def main() -> None:
    for (num_nodes, gpus), modes in _EVERY.items():
        with fake_gpus(num_nodes, gpus):
            nodes = [entry["NodeManagerAddress"] for entry in ray.nodes()]
            nodes.sort(key=lambda address: address == SECOND_ADDRESS)
            for mode, needed in modes.items():
                print(f"\n{num_nodes} × {gpus}, {mode}:\n")  # noqa: T201  its output
                print("| role | " + " | ".join(f"node {n}" for n, _ in enumerate(nodes)) + " |")  # noqa: T201
                print("|---|" + "---|" * len(nodes))  # noqa: T201
                try:
                    for row in rows(asyncio.run(found(needed, mode)), nodes):
                        print(row, flush=True)  # noqa: T201
                except CapacityError as error:
                    print(f"refused: {error}")  # noqa: T201


if __name__ == "__main__":
    main()
