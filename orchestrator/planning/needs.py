"""What a placement plan needs on each node, and whether the node has it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from orchestrator.errors import CapacityError
from orchestrator.planning.host import host_peaks
from orchestrator.planning.memory import Memory, gib
from orchestrator.planning.peaks import ENGINE, Peak, highest, peaks, with_cache
from orchestrator.planning.placement import Mode, Plan, Slot, in_turn

_NEARLY_FULL = 0.95


@dataclass(frozen=True)
class NodeNeed:
    """Bytes that a plan needs on one node, and bytes that the node has (None: unknown).

    Args:
        kind: memory of the host, or of its fullest GPU.
        certain: without what is needed only while roles compute; on GPUs with it.
        peak: the phase that needs most, and its parts.
    """

    address: str
    kind: Literal["memory", "GPU memory"]
    certain: float
    needed: float
    available: float | None
    peak: Peak

    def describe(self) -> str:
        there = "unknown" if self.available is None else gib(self.available)
        at = "" if self.is_of_host else " on the fullest GPU"
        about = f"{self.kind} needed about {gib(self.needed)}{at}, in phase {self.peak.describe()}"
        return f"{self.address}: {about}, available {there}"

    @property
    def is_of_host(self) -> bool:
        return self.kind == "memory"


@dataclass(frozen=True)
class NodeOffer:
    """Memory of one node: of the host, and of each of its GPUs. None: unknown."""

    memory: float | None
    gpu_memory: float | None = None


@dataclass(frozen=True)
class Sharing:
    """How GPUs are shared.

    Args:
        mode: placement.mode.
        utilization: share of a GPU that an engine takes; rollout.gpu_memory_utilization.
        bucket_bytes: of a publish through the host.
    """

    mode: Mode = "separate"
    utilization: float = 1.0
    bucket_bytes: float = 0.0


def needs(
    plan: Plan, memory_of: Mapping[str, Memory], offers: Mapping[str, NodeOffer], sharing: Sharing = Sharing()
) -> list[NodeNeed]:
    """Sums a plan's processes per node. The coordinator, which may run on any node, is counted on the first.

    Args:
        memory_of: memory of one actor by role.
        offers: memory of nodes by address.
    """
    found: list[NodeNeed] = []
    turns = in_turn({slot.role for slot in plan.slots if slot.gpus}, sharing.mode)
    for index, (address, offer) in enumerate(offers.items()):
        slots = [slot for slot in plan.slots if slot.address == address]
        certain, most = (
            highest(
                host_peaks(
                    slots,
                    memory_of,
                    in_turn=turns,
                    bucket_bytes=sharing.bucket_bytes,
                    computes=computes,
                    has_coordinator=index == 0,
                )
            )
            for computes in (False, True)
        )
        found.append(NodeNeed(address, "memory", certain.total, most.total, offer.memory, most))
        on_gpu = [slot for slot in slots if slot.gpus]
        if on_gpu:
            peak = highest(
                [
                    peak
                    for roles in _by_gpu(on_gpu)
                    for peak in _peaks(roles, memory_of, offer, sharing.utilization, turns)
                ]
            )
            found.append(NodeNeed(address, "GPU memory", peak.total, peak.total, offer.gpu_memory, peak))
    return found


def _by_gpu(slots: Sequence[Slot]) -> Iterator[list[str]]:
    for gpu in dict.fromkeys(gpu for slot in slots for gpu in slot.gpus):
        yield [slot.role for slot in slots if gpu in slot.gpus]


def _peaks(
    roles: Sequence[str],
    memory_of: Mapping[str, Memory],
    offer: NodeOffer,
    utilization: float,
    turns: Collection[str],
) -> list[Peak]:
    here = {role: memory_of[role] for role in roles}
    if ENGINE in here and offer.gpu_memory is not None:
        here[ENGINE] = _filling(here[ENGINE], offer.gpu_memory, utilization)
    return peaks(here, takes_turns=len(here) > 1 and here.keys() <= set(turns))


def _filling(engine: Memory, gpu_memory: float, utilization: float) -> Memory:
    """Raises CapacityError if an engine's share of a GPU has no room for a cache."""
    found = with_cache(engine, utilization * gpu_memory)
    if found.cache <= 0:
        raise CapacityError(
            f"rollout.gpu_memory_utilization={utilization:g} of a GPU's {gib(gpu_memory)} has no room for a KV cache "
            f"beside the engine's weights {gib(engine.state)} and work {gib(engine.working)}. Raise it, or "
            "rollout.tensor_parallel_size, or lower rollout.samples_per_shard."
        )
    return found


def too_much(found: Sequence[NodeNeed]) -> list[str]:
    """Warnings about nodes that probably have too little memory, or whose GPUs' memory is unknown.

    Raises:
        CapacityError: a node's memory is less than weights, optimizer states and gradients alone; or a GPU's is less
            than the highest peak of a step.
    """
    way_out = (
        "Add nodes or memory, choose a smaller model, a higher zero_stage with more ranks, or fewer actors; "
        "gradient_checkpointing and a smaller micro_batch_tokens reduce the memory of a step."
    )
    on_gpus = f"{way_out} offload_optimizer moves states to the host. `rlhf plan` finds settings that fit."
    known = [(need, need.available) for need in found if need.available is not None]
    short = [(need, there) for need, there in known if need.certain > there]
    if short:
        reasons = "; ".join(_shortage(need, there) for need, there in short)
        is_of_host = all(need.is_of_host for need, _ in short)
        raise CapacityError(f"too little memory: {reasons}. {way_out if is_of_host else on_gpus}")
    warnings = [
        f"{need.describe()}. It may not fit. {way_out if need.is_of_host else on_gpus}"
        for need, there in known
        if need.needed > (there if need.is_of_host else _NEARLY_FULL * there)
    ]
    if any(not need.is_of_host and need.available is None for need in found):
        warnings.append(
            "the memory of the GPUs is unknown and not checked: Ray names no known kind. Set placement.gpu_memory_gib."
        )
    return warnings


def _shortage(need: NodeNeed, there: float) -> str:
    if need.is_of_host:
        return (
            f"{need.address} has {gib(there)} of {need.kind}, and weights, optimizer states and gradients of the "
            f"actors placed there take {gib(need.certain)} (most in phase {need.peak.describe()})"
        )
    text = f"a GPU of {need.address} has {gib(there)}, and phase {need.peak.describe()} takes more"
    room = there - need.peak.total + need.peak.parts.get(ENGINE, 0.0)
    if need.peak.phase == "sample":
        fits = math.floor(100 * max(room, 0.0) / there) / 100
        text += f"; rollout.gpu_memory_utilization={fits:g} would leave the other roles their room"
    return text
