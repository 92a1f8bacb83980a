"""Searches the layouts of work over a number of GPUs: simulates each, and sorts them by speed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.config.base import Dtype
from orchestrator.errors import CapacityError
from orchestrator.failures import LEARNERS
from orchestrator.planning.costs import LearnSettings
from orchestrator.planning.hardware import Device
from orchestrator.planning.simulation.fit import DeviceMemory, cache_tokens, memory_per_device
from orchestrator.planning.simulation.run import simulate
from orchestrator.planning.simulation.scenario import MODELS, Layout, Pool, Prediction, Work

ENGINE_SHARES = (0.125, 0.25, 0.5, 0.75)
MICRO_BATCH_TOKENS = (65536, 32768, 16384, 8192, 4096, 2048, 1024)
ENGINE_WIDTHS = (1, 2, 4, 8)
_SHARE_OF_WORKING = 0.25  # share of a GPU's memory beyond which KV cache is worth more than a larger micro-batch


@dataclass(frozen=True)
class Candidate:
    """A layout that fits, and its predicted time."""

    layout: Layout
    memory: Sequence[DeviceMemory]
    prediction: Prediction


@dataclass(frozen=True)
class Search:
    """`candidates`: fastest first. `refused`: reason and remedy for each layout that does not fit."""

    candidates: Sequence[Candidate]
    refused: Mapping[str, str]


def search(
    work: Work,
    device: Device,
    devices: int,
    *,
    learning: Mapping[str, LearnSettings],
    dtype: Dtype,
    staleness: int,
    widths: Sequence[int] = ENGINE_WIDTHS,
) -> Search:
    """Args:
    learning: settings of each role. Layouts that do not fit are tried with ZeRO-3 and gradient checkpointing, and then
        with optimizers on the host.
    staleness: max_staleness to try in separate placements, in addition to 0.
    widths: numbers of devices per engine to try.
    """
    candidates: list[Candidate] = []
    refused: dict[str, str] = {}
    for layout in layouts(work, device, devices, learning=learning, widths=widths):
        try:
            fitting, memory = _fitting(work, layout, dtype)
        except CapacityError as error:
            refused[describe(layout)] = str(error)
            continue
        for versions in {0} if layout.takes_turns else {0, staleness}:
            stale = replace(fitting, max_staleness=versions)
            tokens = cache_tokens(work, stale, memory)
            candidates.append(Candidate(stale, memory, simulate(work, stale, cache_tokens=tokens)))
    return Search(sorted(candidates, key=lambda candidate: candidate.prediction.step_s), refused)


def describe(layout: Layout) -> str:
    stale = f", staleness {layout.max_staleness}" if layout.max_staleness else ""
    return f"{layout.mode}, {layout.engines} engines of {layout.width('rollout')}{stale}"


def layouts(
    work: Work, device: Device, devices: int, *, learning: Mapping[str, LearnSettings], widths: Sequence[int]
) -> Iterator[Layout]:
    """Colocated layouts for each engine width; mixed and separate ones for each width and share of GPUs for engines."""
    roles = [role for role in MODELS if work.models[role] is not None and role not in work.on_trunk]
    for width in (width for width in widths if width <= min(devices, device.per_node)):
        if devices % width == 0:
            pool = Pool(devices, dict.fromkeys(MODELS, devices) | {"rollout": width, "reward": 1})
            engines = devices // width
            yield Layout(device, (pool,), engines, -(-work.scored // engines), 0, devices, learning)
        for share in ENGINE_SHARES:
            engines = int(devices * share) // width
            left = devices - engines * width
            per_shard = -(-work.scored // engines) if engines else 0
            if engines and left and len(roles) > 1:
                shared = Pool(left, dict.fromkeys(MODELS, left) | {"reward": 1})
                mixed = (Pool(engines * width, {"rollout": width}), shared)
                yield Layout(device, mixed, engines, per_shard, 0, left, learning, models_share=True)
            if engines and left >= len(roles):
                apart = _dealt(work, roles, left, learning)
                pools = (Pool(engines * width, {"rollout": width}), *apart)
                replicas = next(pool.devices for pool in apart if "reward" in pool.widths)
                yield Layout(device, pools, engines, per_shard, 0, replicas, learning)


def _dealt(work: Work, roles: Sequence[str], devices: int, learning: Mapping[str, LearnSettings]) -> list[Pool]:
    """One pool per role, sized by its FLOPs: a forward pass counts 1, learning 3 more per epoch. Roles without a model
    share the last pool, where they cost nothing."""
    flops = {}
    for role in roles:
        size = work.models[role]
        passes = 1 + 3 * learning[role].epochs * (role in ("policy", "critic"))
        flops[role] = passes * size.num_params if size else 0
    spare = devices - len(roles)
    counts = {role: 1 + int(spare * flops[role] / sum(flops.values())) for role in roles}
    counts["policy"] += devices - sum(counts.values())
    pools = [Pool(counts[role], {role: 1 if role == "reward" else counts[role]}) for role in roles]
    absent = {role: 1 for role in MODELS if role not in roles}
    return [*pools[:-1], replace(pools[-1], widths={**pools[-1].widths, **absent})]


def _fitting(work: Work, layout: Layout, dtype: Dtype) -> tuple[Layout, list[DeviceMemory]]:
    """The first learning settings that leave room for a whole shard in an engine's cache, else the first that fit, with
    the largest micro-batch that allows it; with optimizers on the host only where nothing else fits. Raises
    CapacityError if none fit."""
    fits, error = None, None
    for way, tokens in itertools.product(_WAYS, MICRO_BATCH_TOKENS):
        if fits is not None and way.offload:
            break
        tried = _learning_so(work, layout, way, tokens)
        try:
            memory = memory_per_device(work, tried, dtype=dtype)
        except CapacityError as too_small:
            error = too_small
            continue
        fits = fits or (tried, memory)
        shard_tokens = layout.samples_per_shard * (work.prompt.mean + work.response.mean)
        is_small = all(part.working <= _SHARE_OF_WORKING * part.available for part in memory)
        if is_small and cache_tokens(work, tried, memory) >= shard_tokens:
            return tried, memory
    if fits is None:
        raise error or CapacityError("no learning settings fit")
    return fits


@dataclass(frozen=True)
class _Way:
    """Changes of the given settings of learning; off: as given."""

    zero_3: bool = False
    checkpoint: bool = False
    offload: bool = False


_WAYS = (
    _Way(),
    _Way(zero_3=True),
    _Way(checkpoint=True),
    _Way(zero_3=True, checkpoint=True),
    _Way(zero_3=True, checkpoint=True, offload=True),
)


def _learning_so(work: Work, layout: Layout, way: _Way, tokens: int) -> Layout:
    """A layout that learns in this way. No trunk with two learners can have ZeRO-3."""
    kept = {"reward", *(LEARNERS if "critic" in work.on_trunk else ())}

    def changed(role: str, settings: LearnSettings) -> LearnSettings:
        stage = 3 if way.zero_3 and role not in kept else settings.zero_stage
        offloads = way.offload and role in LEARNERS and role not in work.on_trunk and stage > 0
        copies = settings.zero_hpz_partition_size
        return replace(
            settings,
            micro_batch_tokens=tokens,
            zero_stage=stage,
            gradient_checkpointing=settings.gradient_checkpointing or way.checkpoint,
            offload_optimizer=settings.offload_optimizer or offloads,
            zero_hpz_partition_size=copies if layout.width(role) % copies == 0 else 1,
        )

    return replace(layout, learning={role: changed(role, each) for role, each in layout.learning.items()})
