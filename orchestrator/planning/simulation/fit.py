"""Checks whether a layout fits into the memory of its devices, and sizes the KV cache. Each rank has one GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.config.base import Dtype
from orchestrator.errors import CapacityError
from orchestrator.planning.memory import Memory, engine_memory, gib, learner_memory, on_trunk_memory, scorer_memory
from orchestrator.planning.simulation.scenario import MODELS, Layout, Pool, Work

USABLE = 0.85  # share of a GPU's memory, as rollout.gpu_memory_utilization
HAS_LOGITS = frozenset({"policy", "reference"})


@dataclass(frozen=True)
class DeviceMemory:
    """Peak bytes of one device of a pool: all states, and the working memory of one role at a time.

    Args:
        cache: bytes of the engines' KV cache; 0 without engines.
    """

    roles: tuple[str, ...]
    state: float
    working: float
    cache: float
    available: float

    @property
    def needed(self) -> float:
        return self.state + self.working + self.cache


def memory_per_device(work: Work, layout: Layout, *, dtype: Dtype) -> list[DeviceMemory]:
    """Memory of a device of each pool.

    Raises:
        CapacityError: a pool is too small; says what is missing and suggests remedies.
    """
    return [_of_pool(work, layout, pool, dtype) for pool in layout.pools]


def cache_tokens(work: Work, layout: Layout, memory: list[DeviceMemory]) -> float:
    """Tokens that the KV cache of one engine holds."""
    (cache,) = (part.cache for part in memory if "rollout" in part.roles)
    return cache * layout.width("rollout") / work.policy.cache_bytes_per_token


def _of_pool(work: Work, layout: Layout, pool: Pool, dtype: Dtype) -> DeviceMemory:
    memory_of = _memory_of_roles(work, layout, pool, dtype)
    state = sum(memory.state for memory in memory_of.values())
    working = max(memory.working for memory in memory_of.values())
    available = USABLE * layout.device.memory_bytes
    least = 0.0
    if "rollout" in memory_of:
        longest = work.prompt.longest + work.response.longest
        least = work.policy.cache_bytes_per_token * longest / layout.width("rollout")
    if state + working + least > available:
        raise CapacityError(_shortage(layout, memory_of, state, working, least, available))
    cache = available - state - working if "rollout" in memory_of else 0.0
    return DeviceMemory(tuple(memory_of), state, working, cache, layout.device.memory_bytes)


def _memory_of_roles(work: Work, layout: Layout, pool: Pool, dtype: Dtype) -> dict[str, Memory]:
    found: dict[str, Memory] = {}
    for role in MODELS:
        size, place = work.models[role], "policy" if role in work.on_trunk else role
        if place not in pool.widths or size is None:
            continue
        settings, ranks = layout.learning[role], pool.widths[place]
        if role in work.on_trunk:
            found[role] = on_trunk_memory(settings.adapters, dtype=dtype, zero_stage=settings.zero_stage, ranks=ranks)
            continue
        if role in ("policy", "critic"):
            found[role] = learner_memory(
                size,
                dtype=dtype,
                zero_stage=settings.zero_stage,
                ranks=ranks,
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
    if "rollout" in pool.widths:
        width = pool.widths["rollout"]
        found["rollout"] = engine_memory(work.policy, dtype=dtype, tensor_parallel_size=width, cache_bytes=0.0)
    return found


def _shortage(
    layout: Layout, memory_of: Mapping[str, Memory], state: float, working: float, least: float, available: float
) -> str:
    largest = max(memory_of, key=lambda role: memory_of[role].state + memory_of[role].working)
    settings = layout.learning.get(largest)
    if largest == "rollout":
        way_out = "a higher rollout.tensor_parallel_size"
    elif settings is not None and settings.zero_stage == 3:
        way_out = f"more than {layout.width(largest)} ranks of {largest}"
    else:
        way_out = "reference.sharded=true" if largest == "reference" else f"{largest}.zero_stage=3 and more ranks"
    cache = f", the cache of one sample {gib(least)}" if least else ""
    return (
        f"{', '.join(memory_of)} on one {layout.device.name}: weights and states {gib(state)}, work {gib(working)}"
        f"{cache}; usable {gib(available)}. Use {way_out}, or larger GPUs."
    )
