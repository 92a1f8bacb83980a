"""Derives the settings of the parts from the config; starts nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

from actors.learning.worker import RankContext
from actors.models.files import weight_bytes
from actors.models.model import model_on_disk
from actors.text.templates import read_template
from orchestrator.algorithms.experience import ExperienceSettings
from orchestrator.algorithms.standardising import WeightedPart
from orchestrator.config.base import Section
from orchestrator.config.config import Config
from orchestrator.config.rewards import (
    JudgeSource,
    ModelRewardConfig,
    ModelSource,
    PairJudgeConfig,
    RewardConfig,
    WeightedRewardConfig,
    main_reward_model,
    reward_models,
)
from orchestrator.config.sections import CriticConfig
from orchestrator.config.stages import StageEntry
from orchestrator.errors import DataError
from orchestrator.planning.demands import REWARD_MODEL, all_demands
from orchestrator.planning.memory import GIB
from orchestrator.planning.placement import in_turn
from orchestrator.types import Sampling, State

LOADING_S_PER_GIB = 60.0  # eight ranks that read 7B weights from one share with 140 MB/s


def chat_template(config: Config) -> str | None:
    """The text of model.chat_template; None: the tokenizer's own. Raises DataError when it can't be read."""
    path = config.model.chat_template
    return None if path is None else read_template(path)


def judge_templates(config: Config) -> dict[str, str]:
    """The texts of the templates of judges that replace the shipped one, by the key of their section. Raises
    DataError."""
    return {
        key: read_template(source.template, f"{key}.template")
        for key, source in config.reward.sources_by_key().items()
        if isinstance(source, JudgeSource) and source.template is not None
    }


def pair_template(judge: PairJudgeConfig) -> str | None:
    """The same for evaluate.judge."""
    return None if judge.template is None else read_template(judge.template, "evaluate.judge.template")


def alone(config: Config, kind: str) -> Config:
    """The config for a command that runs one stage, and neither mirrors its run nor opens trackers and ports."""
    run = config.run.model_copy(update={"mirror": None})
    telemetry = config.telemetry.model_copy(
        update={"prometheus_port": None, "tensorboard": False, "wandb_project": None, "mlflow_uri": None}
    )
    return config.model_copy(update={"stages": (StageEntry(kind=kind, name=kind),), "run": run, "telemetry": telemetry})


def sampling_of(config: Config) -> Sampling:
    rollout = config.rollout
    return Sampling(rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_new_tokens)


def episode_tokens(config: Config) -> int:
    """Most tokens of all segments of an episode: so many that it fits in one micro-batch of each model."""
    limits = [config.policy.micro_batch_tokens, config.reference.micro_batch_tokens]
    if config.algorithm.needs_critic:
        limits.append(config.critic.micro_batch_tokens)
    return max(config.model.max_length, min(limits))


def samples_per_shard(config: Config) -> int:
    """The config's, or, without rollout.reproducible, a step's samples split over the engines; those that are compared
    with each other stay together."""
    if config.rollout.reproducible:
        return config.rollout.shard_size
    if config.algorithm.compares_samples:
        return math.ceil(config.rl.prompts_per_step / config.rollout.replicas) * requests_per_prompt(config)
    return math.ceil(config.samples_per_step / config.rollout.replicas)


def requests_per_prompt(config: Config) -> int:
    """Samples of a prompt in one step, with those that are not learned from."""
    return config.rl.samples_per_prompt + config.algorithm.greedy_samples


def shards_per_step(config: Config, *, is_sharded: bool) -> int | None:
    """The number of shards among which the ranks of a role are split; None if `is_sharded`: each shard needs all
    ranks."""
    return (
        None
        if is_sharded
        else math.ceil(config.rl.prompts_per_step * requests_per_prompt(config) / samples_per_shard(config))
    )


def reward_path(config: Config, inputs: Mapping[str, Path]) -> str | None:
    """The reward model's folder or name: the artifact of an earlier stage, otherwise the config's first. None: the
    reward has no model."""
    if REWARD_MODEL in inputs:
        return str(inputs[REWARD_MODEL])
    return next((source.path for source in reward_models(config.reward).values() if source.path is not None), None)


def has_reward(config: Config, inputs: Mapping[str, Path]) -> bool:
    """Whether all models of the reward are there: stage `evaluate` goes without a reward that is not."""
    return REWARD_MODEL in inputs or None not in {source.path for source in reward_models(config.reward).values()}


def reward_bases(config: Config) -> Mapping[str, tuple[str, int | None]]:
    """By key of its section, the model whose size each reward model has, and how many of its layers are kept (None:
    all)."""
    return {
        key: trained_base(config) if source.path is None else (source.path, None)
        for key, source in reward_models(config.reward).items()
    }


def critic_base(config: Config) -> tuple[str, int | None]:
    """The same for the critic, which starts from the reward model if there is one and critic.path is null."""
    if config.critic.path is not None:
        return config.critic.path, None
    main = main_reward_model(config.reward)
    return (config.model.path, None) if main is None else reward_bases(config)[main[0]]


def reward_max_length(config: Config, source: ModelSource) -> int | None:
    """Maximum transcript length of a reward model. None: its own limit."""
    return source.max_length or (config.reward_model.max_length if source.path is None else None)


def reward_section(config: Config, path: str | None) -> RewardConfig:
    """The reward's section, with the model that stage reward_model trained and the lengths filled in."""

    def filled(source: Section) -> Section:
        if not isinstance(source, ModelSource):
            return source
        return source.model_copy(update={"path": source.path or path, "max_length": reward_max_length(config, source)})

    reward = config.reward
    if isinstance(reward, WeightedRewardConfig):
        return reward.model_copy(update={"sources": {name: filled(one) for name, one in reward.sources.items()}})
    return reward.model_copy(update=dict(filled(reward)))


def states_section(config: Config, path: str | None = None) -> ModelSource:
    """The section of the reward model at `path`, by whose states items for people are chosen: as the run scores with
    it, if it does."""
    main = main_reward_model(config.reward)
    source = ModelRewardConfig() if main is None else main[1]
    longest = reward_max_length(config, source)
    return source.model_copy(update={"path": path, "normalise": False, "max_length": longest})


def trained_base(config: Config) -> tuple[str, int | None]:
    """The model whose size the run's own reward model has, and how many of its layers are kept (None: all)."""
    return config.reward_model.base or config.model.path, config.reward_model.layers


def critic_warmup_steps(config: Config) -> int:
    """Number of initial steps in which only the critic learns; 0 without a critic."""
    return config.critic.warmup_steps if config.algorithm.needs_critic else 0


def initial_state(config: Config) -> State:
    return State(step=0, kl_coefficient=config.algorithm.kl_coefficient)


def experience_settings(config: Config) -> ExperienceSettings:
    return ExperienceSettings(
        config.algorithm,
        requests_per_prompt(config),
        config.reward.clip,
        config.longest_response,
        _standardised_sources(config.reward),
    )


def _standardised_sources(reward: RewardConfig) -> tuple[WeightedPart, ...]:
    """All sources of a weighted reward; none if their scores are summed as they are."""
    if not isinstance(reward, WeightedRewardConfig):
        return ()
    found = [WeightedPart(name, source.weight, source.standardise) for name, source in reward.sources.items()]
    return tuple(found) if any(source.standardise for source in found) else ()


def critic_section(config: Config, reward_path: str | None) -> CriticConfig:
    """The critic's section, with the model filled in: the reward model, if there is one."""
    path = config.critic.path or reward_path
    is_policy = path == config.model.path  # then it gets a new head
    return config.critic.model_copy(update={"path": None if is_policy else path})


def rank_context(config: Config) -> RankContext:
    algorithm = config.algorithm
    return RankContext(
        model=config.model,
        algorithm=algorithm,
        cache=config.run.cache,
        template=chat_template(config),
        temperature=config.rollout.temperature,
        seed=config.run.seed,
        total_optimizer_steps=config.rl.steps * algorithm.epochs * algorithm.minibatches,
        max_new_tokens=config.longest_response,
    )


def within(deadline_s: float) -> float:
    """Seconds for work inside a call with this deadline, so that the work fails with its own error before the call
    does."""
    return 0.8 * deadline_s


def transport_of(config: Config, *, one_host: bool) -> Literal["host", "collective", "shared"]:
    """The transport of published weights. auto follows from devices and placement; `one_host`: of the whole cluster."""
    chosen = config.publish.transport
    if chosen != "auto":
        return chosen
    on_gpus = config.policy.gpus_per_rank > 0, config.rollout.on_gpus
    if not any(on_gpus):
        return "shared" if one_host else "host"
    if not all(on_gpus):
        return "host"
    return "shared" if config.placement.mode == "colocated" else "collective"


def start_s(config: Config) -> float:
    """Deadline of an actor's start: it grows with the largest model of the run. A model that is not on this machine's
    disk does not count. Reads folders, so it is asked for once where actors are started."""
    scorers = [name for name, _ in reward_bases(config).values()]
    chosen_by = [trained_base(config)[0]] if config.people.choose == "active" else []
    names = {config.model.path, config.reference.path, critic_base(config)[0], *scorers, *chosen_by}
    sizes = [0]
    for name in names - {None}:
        with suppress(DataError):
            folder = model_on_disk(str(name), config.run.cache)
            sizes.append(weight_bytes(folder) if folder else 0)
    return config.deadlines.start_s + LOADING_S_PER_GIB * max(sizes) / GIB


def engines_sleep(config: Config) -> bool:
    """Whether engines share GPUs with models, so that they sleep while those compute."""
    return "rollout" in roles_in_turn(config)


def roles_in_turn(config: Config) -> frozenset[str]:
    """The roles with processes of their own that take turns on GPUs. Models on CPUs leave the GPUs to the engines."""
    on_gpus = [demand.role for demand in all_demands(config) if demand.gpus]
    return in_turn(on_gpus, config.placement.mode)
