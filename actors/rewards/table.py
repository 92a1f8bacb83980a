"""The kinds of reward by their config name, and the function that builds each."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping

from actors.rewards import RewardContext, RewardSource
from actors.rewards.environment import WithEpisodes
from orchestrator.config.rewards import EnvironmentRewardConfig, RewardConfig

# Names, not functions: the reward model's module imports torch, which takes seconds and which rules do not need.
# Called as build(section, context), with the sections of orchestrator.config.rewards.REWARDS.
SOURCES: Mapping[str, str] = {
    "model": "actors.rewards.model:build",
    "rules": "actors.rewards.rules:build",
    "http": "actors.rewards.http:build",
    "judge": "actors.rewards.judge:build",
    "environment": "actors.rewards.environment:build",
}


def build_source(reward: RewardConfig, context: RewardContext) -> RewardSource:
    """Builds the source that a config section describes. The rewards of episodes are added to it.

    Raises:
        ConfigError, DataError: it can't be built; see RewardModel, RuleReward, HttpReward, JudgeReward.
    """
    module, _, name = SOURCES[reward.name].partition(":")
    build: Callable[[RewardConfig, RewardContext], RewardSource] = getattr(importlib.import_module(module), name)
    source = build(reward, context)
    is_added = context.adds_episodes and not isinstance(reward, EnvironmentRewardConfig)
    return WithEpisodes(source) if is_added else source
