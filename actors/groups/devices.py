"""The GPUs of a reservation by the names that CUDA_VISIBLE_DEVICES takes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.groups.cluster import Bundle, bundles
from orchestrator.concurrency import together
from orchestrator.errors import CapacityError
from orchestrator.planning.placement import Plan

_DEADLINE_S = 60.0


async def device_names(plan: Plan, reservation: PlacementGroup) -> Mapping[int, str]:
    """Name on its node of each GPU of the plan, by number. Ray chooses the GPUs of a bundle, so each node is asked.

    Raises:
        CapacityError: a node does not answer, or its bundle holds another number of GPUs.
    """
    holding = [(index, bundle) for index, bundle in enumerate(bundles(plan)) if bundle.gpus]
    found = await together(_names(bundle, index, reservation) for index, bundle in holding)
    return {number: name for names in found for number, name in names.items()}


def visible(devices: Sequence[str]) -> dict[str, str]:
    """Environment of an actor that sees these GPUs alone.

    Ray would make visible what an actor asks for. Roles that share a GPU can't ask for parts of it, which Ray packs
    onto as few GPUs as possible, and an actor that asks for none would see all GPUs of its node.
    """
    return {"CUDA_VISIBLE_DEVICES": ",".join(devices), "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


async def _names(bundle: Bundle, index: int, reservation: PlacementGroup) -> Mapping[int, str]:
    there = PlacementGroupSchedulingStrategy(reservation, index)
    task = ray.remote(_visible).options(num_cpus=0, num_gpus=len(bundle.gpus), scheduling_strategy=there)
    address = bundle.slots[0].address
    try:
        names = await asyncio.wait_for(task.remote(), _DEADLINE_S)
    except (TimeoutError, RayError) as error:
        raise CapacityError(
            f"the node {address} did not name its GPUs within {_DEADLINE_S:g} s: {error!r}. Start the run again; "
            "`ray status` shows whether the node is alive."
        ) from error
    if len(names) != len(bundle.gpus):
        raise CapacityError(
            f"the node {address} reserved {len(bundle.gpus)} GPUs and names {names}. Start its Ray with the number of "
            "GPUs that it has, and without a CUDA_VISIBLE_DEVICES that hides some of them."
        )
    return dict(zip(bundle.gpus, names, strict=True))


def _visible() -> list[str]:
    names = [str(name) for name in ray.get_gpu_ids()]
    return sorted(names, key=lambda name: (int(name) if name.isdigit() else 0, name))
