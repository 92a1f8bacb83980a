"""The kinds of reward, by the name that the config gives them, and who builds each."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping

from actors.rewards import RewardContext, RewardSource
from orchestrator.config.rewards import RewardConfig

# Names, not functions: a reward model's module imports torch, which takes seconds; rules and endpoints do without.
# Each is called as build(section, context); the sections are those of orchestrator.config.rewards.REWARDS.
SOURCES: Mapping[str, str] = {
    "model": "actors.rewards.model:build",
    "rules": "actors.rewards.rules:build",
    "http": "actors.rewards.http:build",
}


def build_source(reward: RewardConfig, context: RewardContext) -> RewardSource:
    """The source that a section of the config describes.

    Raises:
        ConfigError, DataError: it can't be built; see RewardModel, RuleReward, HttpReward.
    """
    module, _, name = SOURCES[reward.name].partition(":")
    build: Callable[[RewardConfig, RewardContext], RewardSource] = getattr(importlib.import_module(module), name)
    return build(reward, context)
