"""Checks whether a layout fits into the memory of its devices, and sizes the KV cache. Each rank has one GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.config.base import Dtype
from orchestrator.errors import CapacityError
from orchestrator.failures import LEARNERS
from orchestrator.planning.costs import LearnSettings
from orchestrator.planning.memory import (
    Memory,
    gib,
    gpu_engine_memory,
    learner_memory,
    scorer_memory,
    with_on_trunk,
)
from orchestrator.planning.peaks import ENGINE, START, USABLE, WHOLE_STEP, Peak, highest, peaks, with_cache
from orchestrator.planning.simulation.scenario import MODELS, Layout, Pool, Work

HAS_LOGITS = frozenset({"policy", "reference"})


@dataclass(frozen=True)
class DeviceMemory:
    """Peaks of one device of a pool, phase by phase.

    Args:
        working: most bytes of one role while it computes.
        cache: bytes of the engines' KV cache; 0 without engines.
        utilization: share of the device that an engine takes (rollout.gpu_memory_utilization); 0 without engines.
    """

    roles: tuple[str, ...]
    peaks: tuple[Peak, ...]
    working: float
    cache: float
    utilization: float
    available: float

    @property
    def needed(self) -> float:
        return max(peak.total for peak in self.peaks)

    @property
    def without_cache(self) -> float:
        return max(peak.total - self.cache * _samples(peak) for peak in self.peaks)


def memory_per_device(work: Work, layout: Layout, *, dtype: Dtype) -> list[DeviceMemory]:
    """Memory of a device of each pool.

    Raises:
        CapacityError: a pool is too small; says what is missing and suggests remedies.
    """
    return [_of_pool(work, layout, pool, dtype) for pool in layout.pools]


def cache_tokens(work: Work, layout: Layout, memory: list[DeviceMemory]) -> float:
    """Tokens that the KV cache of one engine holds."""
    (cache,) = (part.cache for part in memory if ENGINE in part.roles)
    return cache * layout.width(ENGINE) / work.policy.cache_bytes_per_token


def _of_pool(work: Work, layout: Layout, pool: Pool, dtype: Dtype) -> DeviceMemory:
    memory_of = _memory_of_roles(work, layout, pool, dtype)
    available = layout.device.memory_bytes
    usable = USABLE * available if layout.utilization is None else available
    takes_turns = len(memory_of) > 1
    found = peaks(memory_of, takes_turns=takes_turns)
    utilization = cache = least = 0.0
    if ENGINE in memory_of:
        least = work.policy.cache_bytes_per_token * (work.prompt.longest + work.response.longest) / pool.widths[ENGINE]
        others = sum(size for peak in found for role, size in peak.parts.items() if _samples(peak) and role != ENGINE)
        utilization = layout.utilization or max(usable - others, 0.0) / available
        memory_of[ENGINE] = with_cache(memory_of[ENGINE], utilization * available)
        cache = memory_of[ENGINE].cache
        found = peaks(memory_of, takes_turns=takes_turns) if cache >= least else found
    if highest(found).total > usable + 1.0 or cache < least:
        raise CapacityError(_shortage(layout, memory_of, highest(found), usable, (cache, least)))
    working = max(memory.working for role, memory in memory_of.items() if role != ENGINE or not takes_turns)
    return DeviceMemory(tuple(memory_of), tuple(found), working, cache, utilization, available)


def _samples(peak: Peak) -> bool:
    return peak.phase in ("sample", WHOLE_STEP)


def _memory_of_roles(work: Work, layout: Layout, pool: Pool, dtype: Dtype) -> dict[str, Memory]:
    """By role with processes of its own."""
    found: dict[str, Memory] = {}
    for role in MODELS:
        size = work.models[role]
        if role not in pool.widths or size is None or role in work.on_trunk:
            continue
        settings, ranks = layout.learning[role], pool.widths[role]
        if role in LEARNERS:
            found[role] = learner_memory(
                size,
                settings.sharding(dtype, ranks),
                micro_batch_tokens=settings.micro_batch_tokens,
                gradient_checkpointing=settings.gradient_checkpointing,
                logits=role in HAS_LOGITS,
                adapters=settings.adapters,
            )
        else:
            found[role] = scorer_memory(
                size,
                dtype=dtype,
                shards=ranks if settings.zero_stage == 3 else 1,
                micro_batch_tokens=settings.micro_batch_tokens,
                logits=role in HAS_LOGITS,
            )
    if "policy" in found and "critic" in work.on_trunk:
        critic = layout.learning["critic"]
        sharding = critic.sharding(dtype, pool.widths["policy"])
        found["policy"] = with_on_trunk(found["policy"], critic.adapters, sharding)
    if "rollout" in pool.widths:
        width = pool.widths["rollout"]
        sequences = min(layout.samples_per_shard, work.scored)
        found["rollout"] = gpu_engine_memory(work.policy, dtype=dtype, tensor_parallel_size=width, sequences=sequences)
    return found


def _shortage(
    layout: Layout, memory_of: Mapping[str, Memory], found: Peak, usable: float, cache: tuple[float, float]
) -> str:
    largest = max(found.parts, key=lambda role: found.parts[role])
    settings = layout.learning.get(largest)
    if found.total <= usable:
        largest = ENGINE
    if largest == ENGINE:
        way_out = "a higher rollout.tensor_parallel_size, a lower rollout.samples_per_shard"
        if layout.utilization is not None and found.total > usable:
            room = max(usable - found.total + found.parts[ENGINE], 0.0) / layout.device.memory_bytes
            way_out = f"rollout.gpu_memory_utilization={int(100 * room) / 100:g}"
    elif found.phase == START and memory_of[largest].starting == memory_of[largest].loading:
        way_out = "smaller models, GPUs of their own for some of these roles"  # all weights are there at first
    elif settings is not None and settings.zero_stage == 3:
        offload = f", {largest}.offload_optimizer=true" if _could_offload(largest, settings) else ""
        ranks = layout.width(largest)
        way_out = f"more than {ranks} ranks of {largest}, a smaller {largest}.micro_batch_tokens{offload}"
    elif largest == "reward":
        way_out = "a smaller reward.micro_batch_tokens, GPUs of its own"
    else:
        way_out = "reference.sharded=true" if largest == "reference" else f"{largest}.zero_stage=3 and more ranks"
    text = f"{', '.join(memory_of)} on one {layout.device.name}: {found.describe()}; usable {gib(usable)}"
    if found.total <= usable:
        text += f", which leaves {gib(max(cache[0], 0.0))} for a KV cache, and one sample needs {gib(cache[1])}"
    return f"{text}. Use {way_out}, or larger GPUs."


def _could_offload(role: str, settings: LearnSettings) -> bool:
    return role in LEARNERS and not settings.offload_optimizer
