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
    rl, rollout, reward = config.rl, config.rollout, config.reward
    if rl.max_staleness and config.placement.mode == "colocated":
        yield (
            f"placement.mode='colocated' needs rl.max_staleness=0, got {rl.max_staleness}: roles that share a "
            "device cannot sample while they learn. Set rl.max_staleness=0 or placement.mode='separate'."
        )
    yield from config.algorithm.contradictions(rl, rollout)
    if rollout.max_new_tokens >= config.model.max_length:
        yield (
            f"rollout.max_new_tokens={rollout.max_new_tokens} leaves no room for a prompt in "
            f"model.max_length={config.model.max_length}. Lower the first or raise the second."
        )
    needs_path = "ppo" in config.stages and isinstance(reward, ModelRewardConfig) and reward.path is None
    if needs_path and "reward_model" not in config.stages:
        yield (
            "reward.name='model' needs reward.path: give the folder of a reward model, or add 'reward_model' to "
            "stages so that one is trained, or choose reward.name='rules'."
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
    if config.checkpoints.best_max_kl is not None and config.checkpoints.best_metric is None:
        yield "checkpoints.best_max_kl needs checkpoints.best_metric: set it, or leave both out."
    yield from _guards_that_contradict(config)


def _guards_that_contradict(config: Config) -> Iterable[str]:
    length, jump, failed = config.guards.length, config.guards.reward_jump, config.guards.failed_rewards
    longest = config.rollout.max_new_tokens
    if length.min is not None and length.min > (length.max or longest):
        key = "guards.length.max" if length.max else "rollout.max_new_tokens"
        yield f"guards.length.min={length.min:g} is above {key}={length.max or longest:g}: no step passes. Lower it."
    if length.max is not None and length.max >= longest:
        yield (
            f"guards.length.max={length.max:g} could never act: no response is longer than "
            f"rollout.max_new_tokens={longest}. Lower it, or leave it out."
        )
    if jump.max is not None and jump.window >= config.rl.steps:
        yield (
            f"guards.reward_jump.window={jump.window} could never be full in rl.steps={config.rl.steps}. Set a "
            "smaller window, or leave guards.reward_jump.max out."
        )
    if failed.max is not None and failed.max >= config.reward.max_failed_fraction:
        yield (
            f"guards.failed_rewards.max={failed.max:g} could never act: the run stops above "
            f"reward.max_failed_fraction={config.reward.max_failed_fraction:g}. Lower the first or raise the second."
        )
