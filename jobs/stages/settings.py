"""Derives the settings of the parts from the config: pure, starts nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from actors.learning.worker import RankContext
from actors.text.templates import read_template
from orchestrator.algorithms.experience import ExperienceSettings
from orchestrator.config.config import Config
from orchestrator.config.rewards import JudgeRewardConfig, ModelRewardConfig, PairJudgeConfig, RewardConfig
from orchestrator.config.sections import CriticConfig
from orchestrator.config.stages import StageEntry
from orchestrator.planning.demands import REWARD_MODEL
from orchestrator.types import Sampling, State


def chat_template(config: Config) -> str | None:
    """The text of model.chat_template; None: the tokenizer's own. Raises DataError when it can't be read."""
    path = config.model.chat_template
    return None if path is None else read_template(path)


def judge_template(config: Config) -> str | None:
    """The text of reward.template; None: there is no judge, or it has the shipped one. Raises DataError."""
    path = config.reward.template if isinstance(config.reward, JudgeRewardConfig) else None
    return None if path is None else read_template(path, "reward.template")


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
        return config.rollout.samples_per_shard
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
    """The reward model's folder or name: the artifact of an earlier stage, otherwise the config's. None: the reward is
    not a model."""
    if REWARD_MODEL in inputs:
        return str(inputs[REWARD_MODEL])
    return config.reward.path if isinstance(config.reward, ModelRewardConfig) else None


def reward_base(config: Config) -> tuple[str, int | None]:
    """The model whose size the reward model has, and how many of its layers are kept (None: all)."""
    if isinstance(config.reward, ModelRewardConfig) and config.reward.path is not None:
        return config.reward.path, None
    return config.reward_model.base or config.model.path, config.reward_model.layers


def critic_base(config: Config) -> tuple[str, int | None]:
    """The same for the critic, which starts from the reward model if there is one and critic.path is null."""
    if config.critic.path is not None:
        return config.critic.path, None
    return reward_base(config) if isinstance(config.reward, ModelRewardConfig) else (config.model.path, None)


def reward_max_length(config: Config) -> int | None:
    """Maximum transcript length of the reward model. None: its own limit."""
    reward = config.reward
    if not isinstance(reward, ModelRewardConfig):
        return None
    if reward.path is None:
        return reward.max_length or config.reward_model.max_length
    return reward.max_length


def reward_section(config: Config, path: str | None) -> RewardConfig:
    """The reward's section, with the model and the length filled in."""
    if not isinstance(config.reward, ModelRewardConfig):
        return config.reward
    return config.reward.model_copy(update={"path": path, "max_length": reward_max_length(config)})


def critic_warmup_steps(config: Config) -> int:
    """Number of initial steps in which only the critic learns; 0 without a critic."""
    return config.critic.warmup_steps if config.algorithm.needs_critic else 0


def initial_state(config: Config) -> State:
    return State(step=0, kl_coefficient=config.algorithm.kl_coefficient)


def experience_settings(config: Config) -> ExperienceSettings:
    return ExperienceSettings(
        config.algorithm, requests_per_prompt(config), config.reward.clip, config.rollout.max_new_tokens
    )


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
        max_new_tokens=config.rollout.max_new_tokens,
    )


def within(deadline_s: float) -> float:
    """Seconds for work inside a call with this deadline, so that the work fails with its own error before the call
    does."""
    return 0.8 * deadline_s


def engines_sleep(config: Config) -> bool:
    """Whether engines share GPUs with learners, so that they sleep while those compute."""
    return config.placement.mode == "colocated" and config.rollout.gpus_per_replica > 0
