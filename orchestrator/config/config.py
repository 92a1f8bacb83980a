"""The configuration: one frozen tree. `docs/configuration.md` is generated from the descriptions of its keys."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from orchestrator.algorithms.algorithm import Algorithm
from orchestrator.algorithms.ppo import Ppo
from orchestrator.algorithms.table import ALGORITHMS
from orchestrator.config.base import ByName, Section
from orchestrator.config.environments import EnvironmentConfig
from orchestrator.config.guards import GuardsConfig
from orchestrator.config.people import PeopleConfig
from orchestrator.config.publishing import PublishConfig
from orchestrator.config.rewards import (
    REWARDS,
    ModelRewardConfig,
    RewardConfig,
    RuleLimits,
    reward_models,
)
from orchestrator.config.sections import (
    CheckpointConfig,
    CriticConfig,
    DeadlinesConfig,
    EvaluateConfig,
    EvaluationConfig,
    FailuresConfig,
    LabellerConfig,
    ModelConfig,
    PlacementConfig,
    PolicyConfig,
    PromptsConfig,
    ReferenceConfig,
    RlConfig,
    RolloutConfig,
    RunConfig,
    SampleConfig,
    ScoreConfig,
    SelectConfig,
    TelemetryConfig,
    TrainingConfig,
)
from orchestrator.config.stages import StageEntry, in_rounds
from orchestrator.config.trainings import (
    DemonstrationsConfig,
    PreferenceConfig,
    PreferencesConfig,
    PtxConfig,
    RewardModelConfig,
    SftConfig,
)


class Config(Section):
    stages: Annotated[tuple[StageEntry, ...], Field(min_length=1), BeforeValidator(in_rounds)] = (
        StageEntry(kind="rl", name="rl"),
    )
    """Stages of the run, in order: sft, sample, score, select, preferences, people, reward_model, preference, rl,
    evaluate.
    A repeated stage needs a unique name: {name: again, kind: rl, set: {rl.steps: 5}}.
    {rounds: 2, stages: [sample, rl]} repeats stages: sample-1, rl-1, sample-2, rl-2."""
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    prompts: PromptsConfig = PromptsConfig()
    demonstrations: DemonstrationsConfig = DemonstrationsConfig()
    sft: SftConfig = SftConfig()
    sample: SampleConfig = SampleConfig()
    labeller: LabellerConfig = LabellerConfig()
    people: PeopleConfig = PeopleConfig()
    score: ScoreConfig = ScoreConfig()
    select: SelectConfig = SelectConfig()
    preferences: PreferencesConfig = PreferencesConfig()
    reward_model: RewardModelConfig = RewardModelConfig()
    preference: PreferenceConfig = PreferenceConfig()
    reward: Annotated[SerializeAsAny[RewardConfig], ByName(REWARDS, default="model")] = ModelRewardConfig()
    rule_limits: RuleLimits = RuleLimits()
    environment: EnvironmentConfig = EnvironmentConfig()
    policy: PolicyConfig = PolicyConfig()
    critic: CriticConfig = CriticConfig()
    reference: ReferenceConfig = ReferenceConfig()
    rollout: RolloutConfig = RolloutConfig()
    publish: PublishConfig = PublishConfig()
    rl: RlConfig = RlConfig()
    algorithm: Annotated[SerializeAsAny[Algorithm], ByName(ALGORITHMS, default="ppo")] = Ppo()
    ptx: PtxConfig = PtxConfig()
    placement: PlacementConfig = PlacementConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    guards: GuardsConfig = GuardsConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    failures: FailuresConfig = FailuresConfig()
    deadlines: DeadlinesConfig = DeadlinesConfig()

    @property
    def samples_per_step(self) -> int:
        return self.rl.samples_per_step

    @property
    def longest_response(self) -> int:
        """Most tokens of a sample: of all turns, with an environment."""
        window = self.model.max_length - self.prompts.max_prompt_tokens
        return self.environment.longest(self.rollout.max_new_tokens, window)

    @property
    def reference_is_trunk(self) -> bool:
        """Whether the policy answers for the reference, which is then the policy without its adapters."""
        return self.policy.lora.rank > 0 and self.reference.path in (None, self.model.path)

    @property
    def critic_is_on_trunk(self) -> bool:
        """Whether the critic is a second set of adapters, with a head, on the policy's trunk, in its processes."""
        policy, critic = self.policy, self.critic
        starts_from_policy = critic.path == self.model.path or (critic.path is None and not reward_models(self.reward))
        return (
            self.algorithm.needs_critic
            and starts_from_policy
            and min(policy.lora.rank, critic.lora.rank) > 0
            and policy.lora.trunk_bits == critic.lora.trunk_bits
            and max(policy.zero_stage, critic.zero_stage) < 3
        )

    @model_validator(mode="after")
    def _keys_fit_together(self) -> Config:
        for complaint in _contradictions(self):
            raise ValueError(complaint)
        return self


def _contradictions(config: Config) -> Iterable[str]:
    """Contradictions between sections. Each rule is in the section whose key it checks. Dependencies between stages
    are checked in jobs/stages."""
    yield from config.algorithm.contradictions(config.rl, config.rollout)
    yield from config.rollout.contradictions(config.model)
    yield from config.placement.contradictions(config.rl)
    yield from config.publish.contradictions(config.policy, config.rollout, config.placement)
    yield from config.environment.contradictions(config.reward)
    yield from config.reward.contradictions(config.algorithm.reward_parts)
    for name, section in config:
        if isinstance(section, TrainingConfig):
            yield from section.contradictions(name)
    turns = config.environment.turns()
    yield from config.guards.contradictions(config.rl, config.rollout, config.reward, turns)
