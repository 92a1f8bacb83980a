"""Inputs and models of stages that score with the run's reward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jobs.stages.stage import Inputs, ModelUse
from orchestrator.config.config import Config
from orchestrator.config.rewards import JudgeRewardConfig, ModelRewardConfig, RulesRewardConfig
from orchestrator.planning.demands import REWARD_MODEL

INSTEAD = {REWARD_MODEL: "give a reward model (reward.path), or choose reward.name=rules"}


def reward_reads(config: Config) -> Sequence[str]:
    """The kinds of artifacts that the reward needs."""
    reward = model_reward(config)
    return (REWARD_MODEL,) if reward is not None and reward.path is None else ()


def reward_inputs(config: Config) -> Inputs:
    reward = config.reward
    rules = {rule.function for rule in reward.rules} if isinstance(reward, RulesRewardConfig) else set()
    path = reward.path if isinstance(reward, ModelRewardConfig) else None
    template = reward.template if isinstance(reward, JudgeRewardConfig) else None
    return Inputs(files={"reward.template": template}, models={"reward.path": path}, rules=frozenset(rules))


def environments(config: Config) -> frozenset[str]:
    """The environment's class, whose file is part of a run's input."""
    return frozenset({config.environment.name} if config.environment.name else ())


def reward_uses(config: Config) -> Iterable[ModelUse]:
    reward = model_reward(config)
    if reward is not None and reward.path is not None:
        # That it has a head is checked with its statistics.
        yield ModelUse("reward.path", reward.path, scores=True, window=None)


def model_reward(config: Config) -> ModelRewardConfig | None:
    return config.reward if isinstance(config.reward, ModelRewardConfig) else None
