"""What a placement plan needs on each node, and whether the node has it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from orchestrator.errors import CapacityError
from orchestrator.planning.memory import COORDINATOR_PROCESS, RAY_PROCESSES, Memory, gib
from orchestrator.planning.peaks import ENGINE, Peak, highest, peaks, with_cache
from orchestrator.planning.placement import Plan, Slot

_NEARLY_FULL = 0.95


@dataclass(frozen=True)
class NodeNeed:
    """Bytes that a plan needs on one node, and bytes that the node has (None: unknown).

    Args:
        kind: memory of the host, or of its fullest GPU.
        certain: without what is needed only while roles compute; on GPUs with it.
        peak: of the fullest GPU.
    """

    address: str
    kind: Literal["memory", "GPU memory"]
    certain: float
    needed: float
    available: float | None
    peak: Peak | None = None

    def describe(self) -> str:
        there = "unknown" if self.available is None else gib(self.available)
        at = f" on the fullest GPU, in phase {self.peak.describe()}" if self.peak else ""
        return f"{self.address}: {self.kind} needed about {gib(self.needed)}{at}, available {there}"


@dataclass(frozen=True)
class NodeOffer:
    """Memory of one node: of the host, and of each of its GPUs. None: unknown."""

    memory: float | None
    gpu_memory: float | None = None


@dataclass(frozen=True)
class Sharing:
    """How GPUs are shared.

    Args:
        takes_turns: roles on one GPU take turns (placement.mode colocated or mixed).
        utilization: share of a GPU that an engine takes; rollout.gpu_memory_utilization.
    """

    takes_turns: bool = False
    utilization: float = 1.0


def needs(
    plan: Plan, memory_of: Mapping[str, Memory], offers: Mapping[str, NodeOffer], sharing: Sharing = Sharing()
) -> list[NodeNeed]:
    """Sums a plan's processes per node. The coordinator, which may run on any node, is counted on the first.

    Args:
        memory_of: memory of one actor by role.
        offers: memory of nodes by address.
    """
    found: list[NodeNeed] = []
    for index, (address, offer) in enumerate(offers.items()):
        slots = [slot for slot in plan.slots if slot.address == address]
        extra = RAY_PROCESSES + (COORDINATOR_PROCESS if index == 0 else 0)
        on_cpu = [memory_of[slot.role] for slot in slots if not slot.gpus]
        on_gpu = [slot for slot in slots if slot.gpus]
        at_rest = sum(
            memory_of[slot.role].process + memory_of[slot.role].offloaded + _moved_to_host(slot, memory_of, sharing)
            for slot in on_gpu
        )
        found.append(
            NodeNeed(
                address,
                "memory",
                certain=extra + sum(m.state + m.process for m in on_cpu) + at_rest,
                needed=extra + sum(m.on_cpu for m in on_cpu) + at_rest,
                available=offer.memory,
            )
        )
        if on_gpu:
            peak = highest([peak for roles in _by_gpu(on_gpu) for peak in _peaks(roles, memory_of, offer, sharing)])
            found.append(NodeNeed(address, "GPU memory", peak.total, peak.total, offer.gpu_memory, peak))
    return found


def _by_gpu(slots: Sequence[Slot]) -> Iterator[list[str]]:
    for gpu in dict.fromkeys(gpu for slot in slots for gpu in slot.gpus):
        yield [slot.role for slot in slots if gpu in slot.gpus]


def _peaks(roles: Sequence[str], memory_of: Mapping[str, Memory], offer: NodeOffer, sharing: Sharing) -> list[Peak]:
    here = {role: memory_of[role] for role in roles}
    if ENGINE in here and offer.gpu_memory is not None:
        here[ENGINE] = _filling(here[ENGINE], offer.gpu_memory, sharing.utilization)
    return peaks(here, takes_turns=sharing.takes_turns and len(here) > 1)


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


def _moved_to_host(slot: Slot, memory_of: Mapping[str, Memory], sharing: Sharing) -> float:
    """What leaves shared GPUs: a learner's states, and an engine's weights during an evaluation."""
    memory = memory_of[slot.role]
    if not sharing.takes_turns:
        return 0.0
    return memory.state * len(slot.gpus) if slot.role == ENGINE else memory.resting


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
        raise CapacityError(f"too little memory: {reasons}. {on_gpus if any(n.peak for n, _ in short) else way_out}")
    warnings = [
        f"{need.describe()}. It may not fit. {on_gpus if need.peak else way_out}"
        for need, there in known
        if need.needed > (_NEARLY_FULL * there if need.peak else there)
    ]
    if any(need.peak and need.available is None for need in found):
        warnings.append(
            "the memory of the GPUs is unknown and not checked: Ray names no known kind. Set placement.gpu_memory_gib."
        )
    return warnings


def _shortage(need: NodeNeed, there: float) -> str:
    if need.peak is None:
        return (
            f"{need.address} has {gib(there)} of {need.kind}, and weights, optimizer states and gradients of the "
            f"actors placed there take {gib(need.certain)}"
        )
    text = f"a GPU of {need.address} has {gib(there)}, and phase {need.peak.describe()} takes more"
    room = there - need.peak.total + need.peak.parts.get(ENGINE, 0.0)
    if need.peak.phase == "sample":
        fits = math.floor(100 * max(room, 0.0) / there) / 100
        text += f"; rollout.gpu_memory_utilization={fits:g} would leave the other roles their room"
    return text
