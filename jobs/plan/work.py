"""Derives the simulation's input from a config: sizes of models, work of a step, and the configured layout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from transformers import AutoConfig

from actors.models.model import resolve_model
from actors.models.size import model_size
from jobs.stages.settings import critic_base, reward_bases, samples_per_shard
from orchestrator.config.base import Dtype
from orchestrator.config.config import Config
from orchestrator.config.rewards import reward_models
from orchestrator.config.sections import LearnerConfig
from orchestrator.config.trainings import OfflineConfig
from orchestrator.planning.costs import Dimensions, LearnSettings, as_one
from orchestrator.planning.demands import all_demands
from orchestrator.planning.hardware import Device
from orchestrator.planning.memory import BYTES_OF, ModelSize
from orchestrator.planning.simulation.scenario import MODELS, ROLES, Layout, Pool, Spread, Work

KEPT = 0.5
"""Assumed share of the prompts whose samples differ in reward: dynamic sampling keeps these."""


def dimensions(folder: Path, *, dtype: Dtype, layers: int | None = None, trust_remote_code: bool = False) -> Dimensions:
    """From config.json; no weights are needed. Raises DataError when the architecture is unknown."""
    size = model_size(folder, layers=layers, trust_remote_code=trust_remote_code)
    text = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).get_text_config()
    heads = text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or size.hidden // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    return Dimensions(
        **vars(size),
        kv_width=kv_heads * head_width,
        tied=bool(text.tie_word_embeddings),
        bytes_per_weight=BYTES_OF[dtype],
    )


def models_of(config: Config, trained_reward: Path | None = None) -> dict[str, Dimensions | None]:
    """The model of each role; None if the reward has no model, or if there is no critic.

    Args:
        trained_reward: the model that the reward_model stage trained, if it has run. None: as large as its base.

    Raises:
        DataError: a model can't be found or is of no known architecture.
    """
    trained = (str(trained_reward), None) if trained_reward else None
    critic = trained if trained and config.critic.path is None else critic_base(config)
    named = {
        "policy": (config.model.path, None),
        "reference": (config.reference.path or config.model.path, None),
        "critic": critic if config.algorithm.needs_critic else None,
    }
    rewards = [
        trained if trained and reward_models(config.reward)[key].path is None else base
        for key, base in reward_bases(config).items()
    ]
    sizes = {
        named_model: dimensions(
            resolve_model(named_model[0], config.run.cache),
            dtype=config.model.compute_dtype,
            layers=named_model[1],
            trust_remote_code=config.model.trust_remote_code,
        )
        for named_model in {*named.values(), *rewards}
        if named_model is not None
    }
    models = {role: sizes[named_model] if named_model else None for role, named_model in named.items()}
    for role, section in (("policy", config.policy), ("critic", config.critic)):
        size = models[role]
        models[role] = size and replace(size, trunk_bits=section.lora.trunk_bits)
    return {**models, "reward": as_one([sizes[model] for model in rewards]) if rewards else None}


def trained_reward_size(config: Config) -> Dimensions:
    """That of the model that stage reward_model trains. Raises DataError as models_of does."""
    folder = resolve_model(config.reward_model.base or config.model.path, config.run.cache)
    return dimensions(
        folder,
        dtype=config.model.compute_dtype,
        layers=config.reward_model.layers,
        trust_remote_code=config.model.trust_remote_code,
    )


def work_of(
    config: Config,
    *,
    prompt_tokens: float | None,
    response_tokens: float | None,
    deviation: float,
    kept: float = KEPT,
) -> Work:
    """Args:
    prompt_tokens, response_tokens: means. None: all have the maximum length.
    deviation: of response lengths, relative to their mean.
    kept: share of prompts that dynamic sampling (algorithm.filter_rounds) keeps.
    """
    longest_prompt, longest = config.prompts.max_prompt_tokens, config.longest_response
    return Work(
        models_of(config),
        config.samples_per_step,
        Spread(prompt_tokens or longest_prompt, longest_prompt),
        Spread(response_tokens or longest, longest, deviation if response_tokens else 0.0),
        sharing=sharing_of(config),
        on_trunk=on_trunk(config),
        greedy=config.algorithm.greedy_samples,
        rounds=further_rounds(config.algorithm.filter_rounds, kept),
    )


def further_rounds(most: int | None, kept: float) -> int:
    """Rounds after the first until a step is full, if this share of the prompts of each is kept; at most `most` (None:
    all prompts are learned from)."""
    return min(most or 0, math.ceil(1.0 / kept) - 1)


def on_trunk(config: Config) -> frozenset[str]:
    """The roles without weights of their own."""
    shared = {"critic": config.critic_is_on_trunk, "reference": config.reference_is_trunk}
    return frozenset(role for role, is_shared in shared.items() if is_shared)


def sharing_of(config: Config) -> int:
    """Number of samples whose prompt is computed once: all of a prompt, if the algorithm compares them."""
    return config.rl.samples_per_prompt if config.algorithm.compares_samples else 1


def learning_of(config: Config) -> Mapping[str, LearnSettings]:
    """Raises DataError as models_of does, if policy or critic have adapters."""
    rewards = reward_models(config.reward).values()
    has_adapters = config.policy.lora.rank or config.critic.lora.rank
    models = models_of(config) if has_adapters else {}

    passes = {"epochs": config.algorithm.epochs, "minibatches": config.algorithm.minibatches}
    return {
        "policy": learn_settings(config.policy, models.get("policy"), **passes),
        "critic": learn_settings(config.critic, models.get("critic"), **passes),
        "reference": LearnSettings(
            3 if config.reference.sharded else 0, micro_batch_tokens=config.reference.micro_batch_tokens
        ),
        "reward": LearnSettings(0, micro_batch_tokens=min(source.micro_batch_tokens for source in rewards))
        if rewards
        else LearnSettings(0),
    }


def learn_settings(
    section: LearnerConfig | OfflineConfig, size: ModelSize | None, *, epochs: int, minibatches: int
) -> LearnSettings:
    """Args: size: of the model, for the number of its adapters' parameters. None: it has none, or does not matter."""
    return LearnSettings(
        section.zero_stage,
        epochs,
        minibatches,
        section.micro_batch_tokens,
        section.gradient_checkpointing,
        size.adapter_params(section.lora) if size else 0,
        section.offload_optimizer,
        section.zero_hpz_partition_size,
    )


def layout_of(config: Config, device: Device, devices: int) -> Layout:
    """The configured layout on a number of cores or GPUs, which all roles share if colocated."""
    needed = {demand.role: demand for demand in all_demands(config) if demand.role in ROLES}
    sizes = {role: max(1, round(demand.gpus or demand.cpus)) for role, demand in needed.items()}
    counts = {role: demand.count for role, demand in needed.items()}
    widths = {role: sizes[role] * (1 if role == "reward" else counts[role]) for role in MODELS if role in needed}
    mode = config.placement.mode
    if mode == "colocated":
        together = {role: min(devices, width) for role, width in {**widths, "rollout": sizes["rollout"]}.items()}
        pools = [Pool(devices, together)]
    elif mode == "mixed":
        shared = max(sizes[role] * counts[role] for role in widths)
        pools = [Pool(sizes["rollout"] * counts["rollout"], {"rollout": sizes["rollout"]}), Pool(shared, widths)]
    else:
        widths["rollout"] = sizes["rollout"]
        pools = [Pool(sizes[role] * counts[role], {role: width}) for role, width in widths.items()]
    return Layout(
        device,
        tuple(pools),
        counts["rollout"],
        samples_per_shard(config),
        config.rl.max_staleness,
        counts["reward"],
        learning_of(config),
        utilization=config.rollout.gpu_memory_utilization if config.rollout.gpus_per_replica else None,
        models_share=mode == "mixed",
    )
