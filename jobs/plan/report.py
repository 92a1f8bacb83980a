"""The output of `rlhf plan`: layouts of a config's work on a cluster, the fastest first, and those that do not fit."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from rich.table import Table

from actors.machine.probe import machine_speed
from jobs.check.capacity import Cluster, adapter_lines, capacity, find_cluster
from jobs.check.engine import check_width, divided_of
from jobs.command import out, say
from jobs.plan.work import KEPT, layout_of, learning_of, work_of
from jobs.resolve import WITHOUT_TRIAL, resolved
from orchestrator.config.config import Config
from orchestrator.config.loader import config_from_tree
from orchestrator.config.rewards import reward_models
from orchestrator.errors import CapacityError, ConfigError
from orchestrator.failures import LEARNERS
from orchestrator.planning.demands import all_demands
from orchestrator.planning.hardware import DEVICES, Device, cpu_core, device_of
from orchestrator.planning.memory import GIB, gib
from orchestrator.planning.needs import NodeOffer
from orchestrator.planning.placement import Node, place
from orchestrator.planning.simulation.fit import DeviceMemory, cache_tokens, memory_per_device
from orchestrator.planning.simulation.run import simulate
from orchestrator.planning.simulation.scenario import MODELS, Layout, Prediction, Work
from orchestrator.planning.simulation.search import ENGINE_WIDTHS, Candidate, Search, describe, search
from orchestrator.watching.telemetry import clock_text

SHOWN = 8


@dataclass(frozen=True)
class Target:
    """The cluster to plan for; None: the present one."""

    gpus: int | None
    gpu_kind: str | None
    nodes: int | None
    price: float | None
    ray_address: str | None


@dataclass(frozen=True)
class MeanLengths:
    """Lengths of prompts and responses in tokens (None: the longest allowed), and the responses' relative spread."""

    prompt: float | None
    response: float | None
    spread: float


def plan(config: Config, target: Target, lengths: MeanLengths, *, kept: float = KEPT) -> None:
    """Prints the candidates.

    Args:
        kept: share of prompts that dynamic sampling keeps.

    Raises:
        CapacityError: nothing fits; says what is missing and suggests remedies.
        ConfigError: the kind of GPU is unknown.
        DataError: a model's config can't be read.
    """
    config = _for_target(config, target)
    means = {"prompt_tokens": lengths.prompt, "response_tokens": lengths.response}
    work = work_of(config, **means, deviation=lengths.spread, kept=kept)
    _show_work(config, work, lengths)
    for line in _more_samples(config, work, kept):
        say(line)
    found, what = _search(config, work, target)
    show_configured(config, work, target)
    for reason, names in _by_reason(found).items():
        say(f"does not fit: {'; '.join(names)}: {reason}")
    if not found.candidates:
        raise CapacityError("nothing fits; the lines above give the reason and a remedy for each placement.")
    _show(config, found, what)


def show_configured(config: Config, work: Work, target: Target) -> None:
    """The config as it is, if it asks for GPUs: its time and memory, or why it does not fit."""
    needed = all_demands(config)
    num_gpus = target.gpus
    if not config.rollout.gpus_per_replica or num_gpus is None:
        return
    device = device_for(target, num_gpus)
    layout = layout_of(config, device, num_gpus)
    try:
        check_width(config)
        place(needed, _nodes(device, num_gpus), mode=config.placement.mode)
        memory = memory_per_device(work, layout, dtype=config.model.compute_dtype)
        hosts = [need for need in capacity(config, _unknown(device, num_gpus)).nodes if need.is_of_host]
    except (CapacityError, ConfigError) as error:
        say(f"the config as it is does not fit: {error}")
        return
    told = simulate(work, layout, cache_tokens=cache_tokens(work, layout, memory))
    steps = config.rl.steps
    say(
        f"the config as it is: {describe(layout)}: {told.step_s:.1f} s a step, {clock_text(steps * told.step_s)} in all"
    )
    _show_memory(memory)
    say(max(hosts, key=lambda need: need.needed).describe())


def _unknown(device: Device, num_gpus: int) -> Cluster:
    """The planned nodes: how much memory their hosts have is unknown."""
    nodes = _nodes(device, num_gpus)
    return Cluster("the plan", nodes, {node.address: NodeOffer(None, device.memory_bytes) for node in nodes})


def _nodes(device: Device, num_gpus: int) -> list[Node]:
    """Nodes with as many cores as anyone may want: those of planned GPUs are unknown."""
    sizes = [min(device.per_node, num_gpus - first) for first in range(0, num_gpus, device.per_node)]
    return [Node(f"node {number}", 1e6, float(size)) for number, size in enumerate(sizes)]


def _for_target(config: Config, target: Target) -> Config:
    """The resolved config; planned GPUs compute in bf16, independently of this machine."""
    if target.gpus is None or config.model.dtype != "auto":
        return resolved(config, keys=WITHOUT_TRIAL)
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})


def _by_reason(found: Search) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for name, reason in found.refused.items():
        grouped.setdefault(reason, []).append(name)
    return grouped


def _search(config: Config, work: Work, target: Target) -> tuple[Search, str]:
    """The findings, and the cluster that they are for."""
    num_gpus = target.gpus
    if num_gpus is None:
        cluster = find_cluster(target.ray_address, wait_s=config.placement.wait_s)
        num_gpus = int(sum(node.gpus for node in cluster.nodes))
        if not num_gpus:
            return search_cores(config, work, cluster), cluster.what
    device = device_for(target, num_gpus)
    return search_gpus(config, work, device, num_gpus), f"{num_gpus} × {device.name}, {device.per_node} a node"


def device_for(target: Target, num_gpus: int) -> Device:
    """The named kind, or this machine's. Raises ConfigError if both are unknown."""
    kind = target.gpu_kind
    if kind is None:
        there = torch.cuda.get_device_name(0).lower() if torch.cuda.is_available() else ""
        kind = next((name for name in DEVICES if name in there.split()), None)
    if kind is None:
        raise ConfigError(f"the kind of the GPUs is unknown; give --gpu-kind={'|'.join(DEVICES)}.")
    device = device_of(kind)
    per_node = device.per_node if target.nodes is None else -(-num_gpus // target.nodes)
    return replace(device, per_node=per_node, price=device.price if target.price is None else target.price)


def search_gpus(config: Config, work: Work, device: Device, num_gpus: int) -> Search:
    staleness = max(1, config.rl.max_staleness)
    dtype = config.model.compute_dtype
    divided = divided_of(config)
    widths = [width for width in ENGINE_WIDTHS if divided.divides(width)]
    return search(work, device, num_gpus, learning=learning_of(config), dtype=dtype, staleness=staleness, widths=widths)


def search_cores(config: Config, work: Work, cluster: Cluster) -> Search:
    """Without GPUs: the config as it is, and the other placement. Memory is that of nodes, as `rlhf check` has it."""
    cores = int(sum(node.cpus for node in cluster.nodes))
    core = core_of(config)
    candidates: list[Candidate] = []
    refused: dict[str, str] = {}
    for name, variant in _placements(config):
        try:
            capacity(variant, cluster)
        except CapacityError as error:
            refused[name] = str(error)
            continue
        layout = layout_of(variant, core, cores)
        tokens = config.rollout.kv_cache_gib * GIB / work.policy.cache_bytes_per_token
        candidates.append(Candidate(layout, (), simulate(work, layout, cache_tokens=tokens)))
    return Search(sorted(candidates, key=lambda candidate: candidate.prediction.step_s), refused)


def core_of(config: Config) -> Device:
    """One core of a machine like this one, in the config's type."""
    dtype = config.model.compute_dtype
    return cpu_core(dtype, machine_speed(config.run.cache).per_core(dtype))


def _placements(config: Config) -> Iterator[tuple[str, Config]]:
    tree = config.model_dump()
    for mode, staleness in (("colocated", 0), ("separate", 0), ("separate", 1)):
        rl = {**tree["rl"], "max_staleness": staleness}
        algorithm = {**tree["algorithm"], "importance_cap": tree["algorithm"]["importance_cap"] or 2.0}
        placement = {**tree["placement"], "mode": mode}
        yield (
            f"{mode}, staleness {staleness}",
            config_from_tree({**tree, "rl": rl, "algorithm": algorithm, "placement": placement}, source="the plan"),
        )


def settings_of(candidate: Candidate, rewards: Collection[str]) -> list[str]:
    """The overrides for this layout on GPUs; `rewards` are the keys of the sections of reward models."""
    layout, models = candidate.layout, candidate.prediction.idle  # the roles with ranks of their own
    utilization = max(part.utilization for part in candidate.memory)
    lines = [
        f"placement.mode={layout.mode}",
        f"rl.max_staleness={layout.max_staleness}",
        f"rollout.replicas={layout.engines}",
        "rollout.gpus_per_replica=1",
        f"rollout.gpu_memory_utilization={math.floor(100 * utilization) / 100:g}",
        f"rollout.tensor_parallel_size={layout.width('rollout')}",
        f"rollout.samples_per_shard={layout.samples_per_shard}",
        f"reward.replicas={layout.reward_replicas}",
    ]
    if "reference" in models:
        lines += [
            f"reference.ranks={layout.width('reference')}",
            "reference.gpus_per_rank=1",
            f"reference.sharded={str(layout.learning['reference'].zero_stage == 3).lower()}",
            f"reference.micro_batch_tokens={layout.learning['reference'].micro_batch_tokens}",
        ]
    if "reward" in models:
        lines += [
            "reward.gpus_per_replica=1",
            *(f"{key}.micro_batch_tokens={layout.learning['reward'].micro_batch_tokens}" for key in rewards),
        ]
    for role in (role for role in LEARNERS if role in models):
        learning = layout.learning[role]
        lines += [
            f"{role}.ranks={layout.width(role)}",
            f"{role}.gpus_per_rank=1",
            f"{role}.zero_stage={learning.zero_stage}",
            f"{role}.gradient_checkpointing={str(learning.gradient_checkpointing).lower()}",
            f"{role}.micro_batch_tokens={learning.micro_batch_tokens}",
            f"{role}.offload_optimizer={str(learning.offload_optimizer).lower()}",
            f"{role}.zero_hpz_partition_size={learning.zero_hpz_partition_size}",
        ]
    return lines + (["algorithm.importance_cap=2.0"] if layout.max_staleness else [])


def _show_work(config: Config, work: Work, lengths: MeanLengths) -> None:
    size = work.policy
    guess = "" if lengths.response else ", the longest allowed (--response-tokens says what is usual)"
    say(
        f"policy {config.model.path}: {size.num_params / 1e9:.2f} billion parameters; a step: {work.samples} samples, "
        f"prompts of {work.prompt.mean:g}, responses of {work.response.mean:g} tokens{guess}; "
        f"{config.rl.steps} steps"
    )
    for line in adapter_lines(config):
        say(line)


def _more_samples(config: Config, work: Work, kept: float) -> Iterator[str]:
    """What a step samples and does not learn from."""
    if work.greedy:
        yield f"and {work.scored - work.samples} greedy samples a step, which are scored and not learned from"
    if config.algorithm.filter_rounds:
        yield (
            f"dynamic sampling: {work.rounds} further rounds of {work.scored} samples a step, if {kept:.0%} of the "
            f"prompts are kept (--kept) and at most algorithm.filter_rounds={config.algorithm.filter_rounds}"
        )


def _show(config: Config, found: Search, what: str) -> None:
    headings = (
        "placement",
        "devices",
        "micro-batch",
        "step",
        "idle: engines, policy, all",
        "memory, no cache",
        "run",
        "US $",
    )
    table = Table(*headings, title=f"plan: {what}")
    for candidate in found.candidates[:SHOWN]:
        table.add_row(*_cells(config, candidate))
    out.print(table)
    best = found.candidates[0]
    if best.memory:
        say("best: " + " ".join(settings_of(best, reward_models(config.reward))))
        _show_memory(best.memory)


def _show_memory(memory: Sequence[DeviceMemory]) -> None:
    """Peaks by phase, and the parts of each role."""
    for part in memory:
        cache = f", KV cache {gib(part.cache)}" if part.cache else ""
        say(f"memory of a GPU of {', '.join(part.roles)}, of {gib(part.available)}{cache}:")
        for peak in part.peaks:
            say(f"  {peak.describe()}")


def _cells(config: Config, candidate: Candidate) -> Sequence[str]:
    layout, told, steps = candidate.layout, candidate.prediction, config.rl.steps
    widths = " ".join(f"{role}:{layout.devices_of(role)}" for role in MODELS if told.idle.get(role) is not None)
    policy = layout.learning["policy"]
    learning = f"{policy.micro_batch_tokens} ZeRO-{policy.zero_stage}{' ckpt' * policy.gradient_checkpointing}"
    learning += " offload" * policy.offload_optimizer
    fullest = max((part.without_cache for part in candidate.memory), default=0.0)
    return (
        describe(layout),
        widths,
        learning,
        f"{told.step_s:.1f} s",
        f"{told.idle['rollout']:.0%}, {told.idle['policy']:.0%}, {told.idle_devices:.0%}",
        gib(fullest) if fullest else "-",
        clock_text(steps * told.step_s),
        _money(told, layout, steps),
    )


def _money(told: Prediction, layout: Layout, steps: int) -> str:
    money = told.money(layout, steps)
    return "-" if money is None else f"{money:,.0f}"
