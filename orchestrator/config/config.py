"""The configuration: one frozen tree. `docs/configuration.md` is generated from the descriptions of its keys."""

from __future__ import annotations

import typing
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import SerializeAsAny, model_validator

from orchestrator.algorithms.algorithm import Algorithm
from orchestrator.algorithms.ppo import Ppo
from orchestrator.algorithms.table import ALGORITHMS
from orchestrator.config.base import ByName, Section
from orchestrator.config.guards import GuardsConfig
from orchestrator.config.rewards import REWARDS, ModelRewardConfig, RewardConfig, RuleLimits
from orchestrator.config.sections import (
    CheckpointConfig,
    CriticConfig,
    DeadlinesConfig,
    EvaluationConfig,
    FailuresConfig,
    LabellerConfig,
    LearnerConfig,
    ModelConfig,
    PlacementConfig,
    PreferencesConfig,
    PromptsConfig,
    PublishConfig,
    ReferenceConfig,
    RewardModelConfig,
    RlConfig,
    RolloutConfig,
    RunConfig,
    TelemetryConfig,
)

Stage = Literal["preferences", "reward_model", "ppo"]


class Config(Section):
    stages: tuple[Stage, ...] = ("ppo",)
    """Stages of the run, in order: preferences (sample and rank), reward_model, ppo."""
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    prompts: PromptsConfig = PromptsConfig()
    labeller: LabellerConfig = LabellerConfig()
    preferences: PreferencesConfig = PreferencesConfig()
    reward_model: RewardModelConfig = RewardModelConfig()
    reward: Annotated[SerializeAsAny[RewardConfig], ByName(REWARDS, default="model")] = ModelRewardConfig()
    rule_limits: RuleLimits = RuleLimits()
    policy: LearnerConfig = LearnerConfig()
    critic: CriticConfig = CriticConfig()
    reference: ReferenceConfig = ReferenceConfig()
    rollout: RolloutConfig = RolloutConfig()
    publish: PublishConfig = PublishConfig()
    rl: RlConfig = RlConfig()
    algorithm: Annotated[SerializeAsAny[Algorithm], ByName(ALGORITHMS, default="ppo")] = Ppo()
    placement: PlacementConfig = PlacementConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    guards: GuardsConfig = GuardsConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    failures: FailuresConfig = FailuresConfig()
    deadlines: DeadlinesConfig = DeadlinesConfig()

    @property
    def samples_per_step(self) -> int:
        return self.rl.samples_per_step

    @property
    def has_rollouts(self) -> bool:
        """Whether any stage samples replies to the prompts, and so starts rollout engines."""
        return "preferences" in self.stages or "ppo" in self.stages

    @model_validator(mode="after")
    def _keys_fit_together(self) -> Config:
        for complaint in _contradictions(self):
            raise ValueError(complaint)
        return self


def _contradictions(config: Config) -> Iterable[str]:
    """What contradicts between sections; each rule stands with the section whose key it is about."""
    yield from config.algorithm.contradictions(config.rl, config.rollout)
    yield from config.rollout.contradictions(config.model)
    yield from config.placement.contradictions(config.rl)
    yield from config.reward.contradictions(
        is_used="ppo" in config.stages, is_trained_here="reward_model" in config.stages
    )
    trains_on_own_labels = "reward_model" in config.stages and config.preferences.path is None
    if trains_on_own_labels and "preferences" not in config.stages:
        yield (
            "stage 'reward_model' needs preferences.path: give a preference file, or let the labeller make one in a "
            "run with stages=[preferences,reward_model]."
        )
    order = [stage for stage in typing.get_args(Stage) if stage in config.stages]
    if list(config.stages) != order:
        yield f"stages must be distinct and in order; write stages: [{', '.join(order)}]."
    yield from config.guards.contradictions(config.rl, config.rollout, config.reward)
