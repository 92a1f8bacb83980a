"""The needs of a config on a machine or cluster: memory per role, placement, disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import psutil
import ray
import torch

from actors.groups.cluster import alive_nodes, connect, named_address
from actors.models.model import resolve_model
from actors.models.size import model_size
from jobs.prepare import Prepared
from jobs.stages.settings import critic_base, reward_bases, samples_per_shard, states_section, trained_base
from jobs.stages.table import stages_of
from orchestrator.config.config import Config
from orchestrator.config.rewards import reward_models
from orchestrator.config.sections import LearnerConfig, LoraConfig
from orchestrator.config.trainings import OfflineConfig
from orchestrator.failures import LEARNERS
from orchestrator.planning.demands import PREFERENCE, REWARD_MODEL, SFT, STATES, all_demands
from orchestrator.planning.hardware import DEVICES
from orchestrator.planning.memory import (
    AVERAGE_BYTES,
    GIB,
    MIB,
    RECORDER_PROCESS,
    RULES_PROCESS,
    Memory,
    ModelSize,
    Sharding,
    engine_memory,
    gib,
    gpu_engine_memory,
    in_one_process,
    learner_memory,
    scorer_memory,
    with_on_trunk,
)
from orchestrator.planning.needs import NodeNeed, NodeOffer, Sharing, needs, too_much
from orchestrator.planning.placement import Node, Plan

THIS_MACHINE = "this machine"


@dataclass(frozen=True)
class Cluster:
    """The cluster for which a plan is tried: nodes, their memory, and a description."""

    what: str
    nodes: Sequence[Node]
    offers: Mapping[str, NodeOffer]


def find_cluster(ray_address: str | None, *, wait_s: float) -> Cluster:
    """The cluster at `ray_address` or RAY_ADDRESS; without either, this machine, on which no Ray is started.

    Raises:
        CapacityError: no cluster answers at the address.
    """
    address = named_address(ray_address)
    if address is None:
        num_gpus = torch.cuda.device_count()
        sizes = [float(torch.cuda.get_device_properties(index).total_memory) for index in range(num_gpus)]
        node = Node(THIS_MACHINE, float(os.cpu_count() or 1), float(num_gpus))
        offer = NodeOffer(psutil.virtual_memory().total, min(sizes, default=None))
        return Cluster("this machine", [node], {THIS_MACHINE: offer})
    connect(address, wait_s=wait_s)
    return present_cluster()


def present_cluster() -> Cluster:
    """The cluster to which this process is connected."""
    nodes = alive_nodes()
    resources = {entry["NodeManagerAddress"]: entry["Resources"] for entry in ray.nodes() if entry["Alive"]}
    offers = {}
    for node in nodes:
        there = resources[node.address]
        # Ray does not count the object store as part of a node's memory.
        memory = there["memory"] + there["object_store_memory"] if "memory" in there else None
        offers[node.address] = NodeOffer(memory, gpu_memory_of(there))
    return Cluster(f"Ray cluster of {len(nodes)} nodes", nodes, offers)


def gpu_memory_of(resources: Mapping[str, float]) -> float | None:
    """Bytes of each GPU of a Ray node, from the kind that Ray recognizes (`accelerator_type:H100`). None: unknown."""
    kinds = [name.partition(":")[2].lower() for name in resources if name.startswith("accelerator_type:")]
    sizes = [DEVICES[name].memory_bytes for kind in kinds for name in DEVICES if name in kind.split("-")]
    return min(sizes, default=None)


@dataclass(frozen=True)
class Capacity:
    """A plan and its needs; `warnings` say what may not fit."""

    cluster: Cluster
    plan: Plan
    memory_of: Mapping[str, Memory]
    nodes: Sequence[NodeNeed]
    warnings: Sequence[str]
    disk_bytes: float


def capacity(config: Config, cluster: Cluster, prepared: Prepared | None = None) -> Capacity:
    """Places the config's roles and estimates their needs.

    Args:
        prepared: the prompts of a run whose data is good. None: its rows on disk are not counted.

    Raises:
        CapacityError: cores, GPUs or memory are short.
        DataError: a model's config can't be read.
    """
    plans = [entry.stage.plan(entry.config, cluster.nodes) for entry in stages_of(config)]
    plan = max(plans, key=lambda plan: len(plan.slots))  # shows the stage with most actors
    sizes = _Sizes(config)
    roles = {slot.role for each in plans for slot in each.slots}
    memory_of = memory_per_role(config, sizes, roles)
    offers = _offers(config, cluster)
    bucket_bytes = float(config.publish.bucket_mib * MIB)
    sharing = Sharing(config.placement.mode, config.rollout.gpu_memory_utilization, bucket_bytes)
    found = needs(plan, memory_of, offers, sharing)
    warnings = dict.fromkeys(line for each in plans for line in too_much(needs(each, memory_of, offers, sharing)))
    return Capacity(cluster, plan, memory_of, found, list(warnings), disk_bytes(config, sizes, prepared))


def _offers(config: Config, cluster: Cluster) -> Mapping[str, NodeOffer]:
    """The cluster's, with the configured memory of GPUs."""
    given = config.placement.gpu_memory_gib
    if given is None:
        return cluster.offers
    return {address: replace(offer, gpu_memory=given * GIB) for address, offer in cluster.offers.items()}


class _Sizes:
    """Sizes of a config's models, each read once."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._known: dict[tuple[str, int | None], ModelSize] = {}

    def of(self, name: str | None, layers: int | None = None) -> ModelSize:
        model = name or self._config.model.path, layers
        if model not in self._known:
            folder, trust = resolve_model(model[0], self._config.run.cache), self._config.model.trust_remote_code
            self._known[model] = model_size(folder, layers=layers, trust_remote_code=trust)
        return self._known[model]


def memory_per_role(config: Config, sizes: _Sizes, roles: Collection[str]) -> dict[str, Memory]:
    """Memory of one actor of each of these roles. Ignores models of other roles."""
    dtype, reference, rollout = config.model.compute_dtype, config.reference, config.rollout

    def of_policy() -> Memory:
        size = sizes.of(None)
        memory = _learner(config, config.policy, size, logits=True)
        average = AVERAGE_BYTES * size.num_params if config.policy.ema_decay else 0  # on the host
        if config.critic_is_on_trunk:
            sharding = replace(Sharding.of(config.critic, dtype), ranks=config.policy.ranks)
            memory = with_on_trunk(memory, size.adapter_params(config.critic.lora), sharding)
        return replace(memory, process=memory.process + average)

    def of_reward() -> Memory:
        models, bases = reward_models(config.reward), reward_bases(config)
        found = [
            scorer_memory(
                sizes.of(*bases[key]),
                dtype=dtype,
                shards=1,
                micro_batch_tokens=source.micro_batch_tokens,
                logits=False,
            )
            for key, source in models.items()
        ]
        return in_one_process(found) if found else Memory(process=RULES_PROCESS)

    def of_engine() -> Memory:
        size, width = sizes.of(None), rollout.tensor_parallel_size
        if not rollout.gpus_per_replica:
            return engine_memory(size, dtype=dtype, tensor_parallel_size=width, cache_bytes=rollout.kv_cache_gib * GIB)
        return gpu_engine_memory(size, dtype=dtype, tensor_parallel_size=width, sequences=samples_per_shard(config))

    memory_of: Mapping[str, Callable[[], Memory]] = {
        "policy": of_policy,
        "critic": lambda: _learner(config, config.critic, sizes.of(*critic_base(config)), logits=False),
        "reference": lambda: scorer_memory(
            sizes.of(reference.path),
            dtype=dtype,
            shards=reference.ranks if reference.sharded else 1,
            micro_batch_tokens=reference.micro_batch_tokens,
            logits=True,
        ),
        "reward": of_reward,
        STATES: lambda: scorer_memory(
            sizes.of(*trained_base(config)),
            dtype=dtype,
            shards=1,
            micro_batch_tokens=states_section(config).micro_batch_tokens,
            logits=False,
        ),
        "rollout": of_engine,
        "recorder": lambda: Memory(process=RECORDER_PROCESS),
        REWARD_MODEL: lambda: _learner(
            config, config.reward_model, sizes.of(config.reward_model.base, config.reward_model.layers), logits=False
        ),
        SFT: lambda: _learner(config, config.sft, sizes.of(None), logits=True),
        PREFERENCE: lambda: _learner(config, config.preference, sizes.of(None), logits=True),
    }
    return {role: memory_of[role]() for role in memory_of if role in roles}


def _learner(config: Config, learner: LearnerConfig | OfflineConfig, size: ModelSize, *, logits: bool) -> Memory:
    return learner_memory(
        replace(size, trunk_bits=learner.lora.trunk_bits),
        Sharding.of(learner, config.model.compute_dtype),
        micro_batch_tokens=learner.micro_batch_tokens,
        gradient_checkpointing=learner.gradient_checkpointing,
        logits=logits,
        adapters=size.adapter_params(learner.lora),
    )


def adapter_lines(config: Config) -> Iterator[str]:
    """What adapters of reinforcement learning save; nothing if there are none."""
    if not config.policy.lora.rank and not config.critic.lora.rank:
        return
    sizes = _Sizes(config)
    roles: dict[str, tuple[LearnerConfig, ModelSize]] = {"policy": (config.policy, sizes.of(None))}
    if config.algorithm.needs_critic:
        roles["critic"] = (config.critic, sizes.of(*critic_base(config)))
    for role, (section, size) in roles.items():
        if section.lora.rank:
            learned, frozen = size.adapter_params(section.lora) / 1e6, size.num_params / 1e6
            yield f"{role}: {section.lora.describe()}: {learned:.1f} million parameters learn, {frozen:.0f} are frozen"
    shared = [
        name
        for name, is_shared in (("critic", config.critic_is_on_trunk), ("reference", config.reference_is_trunk))
        if is_shared
    ]
    if shared:
        yield f"{' and '.join(shared)} on the policy's trunk: no weights of their own"
    off = {"lora": LoraConfig()}
    full = config.model_copy(
        update={"policy": config.policy.model_copy(update=off), "critic": config.critic.model_copy(update=off)}
    )
    mine, whole = (_states(one, sizes) for one in (config, full))
    yield f"weights and states of policy, critic and reference: {gib(mine)}, and {gib(whole)} without adapters"


def _states(config: Config, sizes: _Sizes) -> float:
    """Bytes over all actors of policy, critic and reference."""
    demands = [demand for demand in all_demands(config) if demand.role in (*LEARNERS, "reference")]
    memory_of = memory_per_role(config, sizes, {demand.role for demand in demands})
    return sum(demand.count * memory_of[demand.role].held for demand in demands)


def disk_bytes(config: Config, sizes: _Sizes, prepared: Prepared | None) -> float:
    """Maximum disk space of a run: what its stages keep, and the most that one of them needs while it runs."""
    stages = stages_of(config)
    uses = [entry.stage.disk(entry.config, sizes) for entry in stages]
    rows = [
        0.0 if prepared is None else entry.stage.rows_disk(entry.config, prepared.of(entry.config)).working
        for entry in stages
    ]
    return sum(use.kept for use in uses) + max(use.working + of_rows for use, of_rows in zip(uses, rows, strict=True))
