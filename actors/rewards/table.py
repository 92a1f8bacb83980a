"""The kinds of reward by their config name, and the function that builds each."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from actors.rewards import RewardContext, RewardSource
from actors.rewards.environment import WithEpisodes
from orchestrator.config.rewards import (
    EnvironmentRewardConfig,
    RewardConfig,
    WeightedEnvironment,
    WeightedSource,
)

# Names, not functions: the reward model's module imports torch, which takes seconds and which rules do not need.
# Called as build(section, context), with the sections of orchestrator.config.rewards.REWARDS.
SOURCES: Mapping[str, str] = {
    "model": "actors.rewards.model:build",
    "rules": "actors.rewards.rules:build",
    "http": "actors.rewards.http:build",
    "judge": "actors.rewards.judge:build",
    "environment": "actors.rewards.environment:build",
    "weighted": "actors.rewards.weighted:build",
}


def build_source(reward: RewardConfig, context: RewardContext) -> RewardSource:
    """Builds the source that a config section describes. The rewards of episodes are added to it.

    Raises:
        ConfigError, DataError: it can't be built; see RewardModel, RuleReward, HttpReward, JudgeReward.
    """
    source = build_alone(reward, context)
    of_episodes = (EnvironmentRewardConfig, WeightedEnvironment)
    has_episodes = any(isinstance(section, of_episodes) for section in reward.sources_by_key().values())
    return WithEpisodes(source) if context.adds_episodes and not has_episodes else source


def build_alone(reward: RewardConfig | WeightedSource, context: RewardContext) -> RewardSource:
    """The same without the rewards of episodes."""
    module, _, name = SOURCES[reward.name].partition(":")
    build: Callable[[Any, RewardContext], RewardSource] = getattr(importlib.import_module(module), name)
    return build(reward, context)
