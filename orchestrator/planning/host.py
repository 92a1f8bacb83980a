"""Memory of one node's host, at the start and in a step, by role.

Weights whose type on disk is that of the run are mapped from their files: pages that all ranks share and that the
kernel takes back. Others are converted, in memory of each rank's own, before they go to its GPU. vLLM always maps
files. What rests is pinned, and stays allocated while it is on the GPU (actors/learning/resting.py).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from orchestrator.planning.memory import COORDINATOR_PROCESS, RAY_PROCESSES, Memory
from orchestrator.planning.peaks import ENGINE, START, WHOLE_STEP, Peak
from orchestrator.planning.placement import Slot

PUBLISH = "publish"
_SENDERS = frozenset({"policy", ENGINE})
_BUCKETS_ON_THE_WAY = 2


def host_peaks(
    slots: Sequence[Slot],
    memory_of: Mapping[str, Memory],
    *,
    in_turn: Collection[str],
    bucket_bytes: float = 0.0,
    computes: bool = True,
    has_coordinator: bool = False,
) -> list[Peak]:
    """Args:
    slots: those of one node.
    in_turn: the roles that leave their GPUs to others.
    bucket_bytes: of a publish through the object store, which is also the way out of broken transports.
    computes: off: without what roles on CPUs need only while they compute.
    """
    fixed = {"Ray": RAY_PROCESSES, **({"coordinator": COORDINATOR_PROCESS} if has_coordinator else {})}
    found: dict[str, dict[str, float]] = {phase: dict(fixed) for phase in (START, WHOLE_STEP, PUBLISH)}
    for slot in slots:
        memory = memory_of[slot.role]
        starting, always = _on_gpu(slot, memory, in_turn) if slot.gpus else _on_cpu(memory, computes=computes)
        for phase, size in ((START, starting), (WHOLE_STEP, always), (PUBLISH, always)):
            found[phase][slot.role] = found[phase].get(slot.role, 0.0) + memory.process + size
    if any(slot.role in _SENDERS for slot in slots):
        found[PUBLISH]["buckets"] = _BUCKETS_ON_THE_WAY * bucket_bytes
    return [Peak(phase, parts) for phase, parts in found.items()]


def _on_gpu(slot: Slot, memory: Memory, in_turn: Collection[str]) -> tuple[float, float]:
    """Besides the process, at the start and afterwards. A learner's states begin to rest when it has started."""
    resting = 0.0
    if slot.role in in_turn:  # an engine keeps its weights during an evaluation
        resting = memory.state * len(slot.gpus) if slot.role == ENGINE else memory.resting
    return max(memory.converting, memory.offloaded), memory.offloaded + resting


def _on_cpu(memory: Memory, *, computes: bool) -> tuple[float, float]:
    return memory.starting, memory.on_device if computes else memory.state
