"""The resource demands of a config's roles: a pure function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from orchestrator.config.config import Config
from orchestrator.config.sections import LearnerConfig, ReferenceConfig
from orchestrator.config.trainings import OfflineConfig
from orchestrator.planning.placement import Demand, Node, Plan, place

RECORDER_CPUS = 1.0
REWARD_MODEL = "reward_model"
"""The name of the reward model among artifacts, and of what trains it in plans and messages."""
STATES = "states"
"""What reads the states of the reward model, by which items for people are chosen."""
SFT = "sft"
PREFERENCE = "preference"


def engine_demand(config: Config) -> Demand:
    rollout = config.rollout
    return Demand(
        "rollout", rollout.replicas, rollout.cpus_per_replica, rollout.gpus_per_replica * rollout.tensor_parallel_size
    )


def reward_demand(config: Config) -> Demand:
    reward = config.reward
    return Demand("reward", reward.replicas, reward.cpus_per_replica, reward.gpus_per_replica)


def states_demand(config: Config) -> Demand:
    """As many as score, in the places of these."""
    return replace(reward_demand(config), role=STATES)


def reference_demand(config: Config) -> Demand:
    """One rank of the reference."""
    return Demand("reference", 1, config.reference.cpus_per_rank, config.reference.gpus_per_rank, is_whole=True)


def all_demands(config: Config) -> list[Demand]:
    """All roles of reinforcement learning."""
    critics = [_ranks("critic", config.critic)]
    references = [_ranks("reference", config.reference)]
    return [
        engine_demand(config),
        _ranks("policy", config.policy),
        *(critics if config.algorithm.needs_critic and not config.critic_is_on_trunk else []),
        *(references if not config.reference_is_trunk else []),
        reward_demand(config),
        Demand("recorder", 1, RECORDER_CPUS),
    ]


def _ranks(role: str, section: LearnerConfig | ReferenceConfig) -> Demand:
    return Demand(role, section.ranks, section.cpus_per_rank, section.gpus_per_rank, is_whole=True)


def plan_training(role: str, section: OfflineConfig, nodes: Sequence[Node]) -> Plan:
    """The workers of a training without rollouts; without threads of their own they share the cores of their node.

    Raises:
        CapacityError: the workers do not fit on the nodes.
    """
    threads = section.cpus_per_rank
    if threads is None:
        per_node = math.ceil(section.ranks / max(len(nodes), 1))
        threads = max(int(min((node.cpus for node in nodes), default=1.0) / per_node), 1)
    demand = Demand(role, section.ranks, threads, section.gpus_per_rank)
    return place([demand], nodes, mode="separate")
