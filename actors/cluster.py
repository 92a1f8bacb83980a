"""The Ray cluster: reaching it, what it offers, and starting actors where the plan says."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, AsyncIterator

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.group import ActorGroup
from actors.process import Process, free_port
from orchestrator.errors import CapacityError
from orchestrator.scheduling.plan import Demand, Node, Plan, Slot, place

# Fresh pages are what eats a learner's time on the CPU: keep them (measured: 481 -> 856 tokens/s in a training step).
KEEP_PAGES = "oversize_threshold:0,dirty_decay_ms:-1,muzzy_decay_ms:-1"
PORT_DEADLINE_S = 60.0
PASSED_ON = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HOME", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK")


def connect(address: str | None, *, wait_s: float) -> None:
    """Joins the cluster at `address` (null: the one that RAY_ADDRESS names, else a local one of this process).

    Raises:
        CapacityError: it does not answer within `wait_s`, or refuses the token.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A GCS that is not there is otherwise waited for much longer than a person does.
    os.environ.setdefault("RAY_gcs_server_request_timeout_seconds", str(max(2, int(wait_s // 2))))
    address = address or os.environ.get("RAY_ADDRESS")
    try:
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False, include_dashboard=None)
    except Exception as error:  # noqa: BLE001  ray raises anything from ValueError to ConnectionError here
        where = address or "this machine"
        raise CapacityError(
            f"no Ray cluster answers at {where} ({str(error).strip().splitlines()[0]}). Check the address and the "
            "token (RAY_AUTH_MODE, RAY_AUTH_TOKEN_PATH), or start one with `ray start --head`."
        ) from error


def alive_nodes() -> list[Node]:
    """Nodes that accept work; a head started with --num-cpus=0 is none of them."""
    nodes = [
        Node(entry["NodeManagerAddress"], entry["Resources"].get("CPU", 0.0), entry["Resources"].get("GPU", 0.0))
        for entry in ray.nodes()
        if entry["Alive"]
    ]
    return sorted((node for node in nodes if node.cpus), key=lambda node: node.address)


async def plan_when_ready(demands: Sequence[Demand], *, mode: Any, wait_s: float) -> Plan:
    """The placement plan; waits up to `wait_s` for nodes that still join. Raises CapacityError saying what is short."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            return place(demands, alive_nodes(), mode=mode)
        except CapacityError:
            if time.monotonic() > deadline or _can_never_fit():
                raise
            await asyncio.sleep(1.0)


def _can_never_fit() -> bool:
    """A cluster of one node that this process started itself never grows."""
    return ray.get_runtime_context().gcs_address.startswith("127.") or os.environ.get("RAY_ADDRESS") is None


@asynccontextmanager
async def reserved(plan: Plan, *, wait_s: float) -> AsyncIterator[PlacementGroup]:
    """Reserves all slots of a plan at once. Raises CapacityError when they are not free within `wait_s`."""
    bundles = [_bundle(slot) for slot in plan.slots]
    group = placement_group(bundles, strategy="PACK")
    try:
        if not await asyncio.to_thread(group.wait, wait_s):
            raise CapacityError(
                f"the cluster did not free the planned resources within placement.wait_s={wait_s:g} s; other jobs hold "
                f"them (`ray status` shows which). The plan was:\n{plan.describe()}"
            )
        yield group
    finally:
        remove_placement_group(group)


def _bundle(slot: Slot) -> dict[str, float]:
    bundle = {f"node:{slot.address}": 0.001, "CPU": slot.cpu_share}
    if slot.gpu_share:
        bundle["GPU"] = slot.gpu_share
    return bundle


def start_group(
    role: str, plan: Plan, reservation: PlacementGroup, worker: type[Any], arguments: Callable[[Slot], Mapping[str, Any]]
) -> ActorGroup:
    """Starts one actor per slot of `role`; returns at once, constructors run on."""
    served = ray.remote(type(worker.__name__, (worker, Process), {}))
    actors = []
    for slot in plan.of(role):
        options = {
            "num_cpus": slot.cpu_share,
            "num_gpus": slot.gpu_share,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(reservation, plan.slots.index(slot)),
            "runtime_env": {"env_vars": environment(slot.threads, on_gpu=slot.gpu_share > 0)},
            "max_restarts": 0,
        }
        actors.append(served.options(**options).remote(**arguments(slot)))
    return ActorGroup(role, actors)


def environment(threads: int, *, on_gpu: bool) -> dict[str, str]:
    """Environment of an actor process: its thread count, its allocator, and nothing that calls home."""
    variables = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    variables |= {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_NO_USAGE_STATS": "1",
    }
    jemalloc = Path(ray.__file__).parent / "core" / "libjemalloc.so"
    if not on_gpu and jemalloc.exists():
        variables |= {"LD_PRELOAD": str(jemalloc), "MALLOC_CONF": KEEP_PAGES}
    return variables


async def rendezvous(plan: Plan, role: str, reservation: PlacementGroup) -> tuple[str, int]:
    """Address and free port on the node of rank 0, where the ranks of `role` meet. A group of one needs no port."""
    first, *others = plan.of(role)
    if not others:
        return first.address, 0
    strategy = PlacementGroupSchedulingStrategy(reservation, plan.slots.index(first))
    port = ray.remote(free_port).options(num_cpus=first.cpu_share, scheduling_strategy=strategy).remote()
    return first.address, await asyncio.wait_for(port, PORT_DEADLINE_S)
