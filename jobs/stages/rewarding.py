"""Inputs and models of stages that score with the run's reward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from jobs.stages.stage import Inputs, ModelUse
from orchestrator.config.config import Config
from orchestrator.config.rewards import JudgeSource, ModelSource, RulesSource, reward_models
from orchestrator.planning.demands import REWARD_MODEL

INSTEAD = {REWARD_MODEL: "give a reward model (reward.path), or choose reward.name=rules"}


def reward_reads(config: Config) -> Sequence[str]:
    """The kinds of artifacts that the reward needs."""
    return (REWARD_MODEL,) if None in {source.path for source in reward_models(config.reward).values()} else ()


def reward_inputs(config: Config) -> Inputs:
    files: dict[str, Path | None] = {}
    models: dict[str, str | None] = {}
    rules: set[str] = set()
    for key, source in config.reward.sources_by_key().items():
        if isinstance(source, RulesSource):
            rules |= {rule.function for rule in source.rules}
        if isinstance(source, ModelSource):
            models[f"{key}.path"] = source.path
        if isinstance(source, JudgeSource):
            files[f"{key}.template"] = source.template
    return Inputs(files=files, models=models, rules=frozenset(rules))


def environments(config: Config) -> frozenset[str]:
    """The environment's class, whose file is part of a run's input."""
    return frozenset({config.environment.name} if config.environment.name else ())


def reward_uses(config: Config) -> Iterable[ModelUse]:
    for key, source in reward_models(config.reward).items():
        if source.path is not None:
            # That it has a head is checked with its statistics.
            yield ModelUse(f"{key}.path", source.path, scores=True, window=None)
