"""Memory of one GPU in each phase of a step (orchestrator/turns.py), by role.

The fixed costs of a process on a GPU and the share lost to fragmentation are assumptions; none has been measured on a
device yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from orchestrator.planning.memory import GIB, Memory, gib
from orchestrator.turns import PHASES, Presence

CONTEXT = 1.0 * GIB  # CUDA context and libraries, buffers of NCCL
CUDA_GRAPHS = 0.75 * GIB  # of an engine, asleep or not
FRAGMENTATION = 0.05  # of what torch's allocator holds
USABLE = 0.92  # share of a GPU that a plan fills

START, WHOLE_STEP = "start", "whole step"
ENGINE = "rollout"
_SHOWN = (START, "sample", "score", "policy", "critic", "publish", WHOLE_STEP)  # evaluate is score


@dataclass(frozen=True)
class Peak:
    """Bytes on one GPU in one phase, by role; contexts included."""

    phase: str
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def describe(self) -> str:
        parts = ", ".join(f"{role} {size / GIB:.1f}" for role, size in self.parts.items())
        return f"{self.phase} {gib(self.total)} ({parts})"


def peaks(memory_of: Mapping[str, Memory], *, takes_turns: bool) -> list[Peak]:
    """Args:
    memory_of: of the roles on the GPU, an engine's with its cache.
    takes_turns: off: all roles compute at the same time.
    """
    if not takes_turns:
        return [Peak(WHOLE_STEP, {role: _always(role, memory) for role, memory in memory_of.items()})]
    found = {START: {role: _starting(role, memory) for role, memory in memory_of.items()}}
    for phase, presence in PHASES.items():
        found[phase] = {role: _in_phase(phase, presence, role, memory) for role, memory in memory_of.items()}
    is_there = {"sample": ENGINE in memory_of, "policy": "policy" in memory_of, "critic": "critic" in memory_of}
    return [Peak(phase, found[phase]) for phase in _SHOWN if phase in found and is_there.get(phase, True)]


def with_cache(engine: Memory, available: float) -> Memory:
    """An engine whose cache fills `available` bytes of a GPU; negative if they are too few for weights and work."""
    return replace(engine, cache=available - engine.state - engine.working - CONTEXT - CUDA_GRAPHS)


def highest(found: list[Peak]) -> Peak:
    return max(found, key=lambda peak: peak.total)


def _always(role: str, memory: Memory) -> float:
    size = memory.state + max(memory.working, memory.scoring, memory.sending)
    if role == ENGINE:
        return CONTEXT + CUDA_GRAPHS + size + memory.cache
    return CONTEXT + max(size, memory.starting) * (1 + FRAGMENTATION)


def _starting(role: str, memory: Memory) -> float:
    """Engines are asleep. All other roles start at the same time."""
    if role == ENGINE:
        return CONTEXT + CUDA_GRAPHS
    return CONTEXT + memory.starting * (1 + FRAGMENTATION)


def _in_phase(phase: str, presence: Presence, role: str, memory: Memory) -> float:
    if role == ENGINE:
        size = memory.state if "weights" in presence.engines else 0.0
        size += memory.cache + memory.working if "kv_cache" in presence.engines else 0.0
        return CONTEXT + CUDA_GRAPHS + size + (memory.sending if phase == "publish" else 0.0)
    size = memory.weights + (memory.resting if role in presence.states else 0.0)
    if phase in ("score", "evaluate"):
        size += memory.scoring
    elif phase == role:
        size += memory.working
    elif phase == "publish":
        size += memory.sending
    return CONTEXT + size * (1 + FRAGMENTATION)
