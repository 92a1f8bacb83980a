"""Stage `rl`: reinforcement learning with the coordinator and all of its roles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from jobs.command import imported
from jobs.stages.sample import policy_use
from jobs.stages.stage import Artifact, Costs, Inputs, ModelUse, Row, Stage, StageJob
from orchestrator.config.config import Config
from orchestrator.config.rewards import ModelRewardConfig, RulesRewardConfig
from orchestrator.planning.demands import REWARD_MODEL, all_demands
from orchestrator.planning.placement import Node, Plan, place
from orchestrator.run.checkpoints import is_complete
from orchestrator.run.folder import RunFolder, has_finished
from orchestrator.watching.telemetry import SHOWN

if TYPE_CHECKING:
    from jobs.prepare import Prepared


class Rl(Stage):
    kind = "rl"
    start_s = 40.0
    samples = True
    has_log = True
    steps_key = "rl.steps"
    shown = SHOWN
    checks = (
        "jobs.check.prompts:enough_to_train",
        "jobs.check.rewards:check_reward",
        "jobs.check.rewards:check_gold",
        "jobs.check.conversations:check_vocabularies",
        "jobs.check.conversations:check_scoring_conversations",
        "jobs.check.rewards:check_reward_window",
        "jobs.check.trackers:check_trackers",
    )
    instead = MappingProxyType({REWARD_MODEL: "give a reward model (reward.path), or choose reward.name=rules"})

    def reads(self, config: Config) -> Sequence[str]:
        reward = _model_reward(config)
        return (REWARD_MODEL,) if reward is not None and reward.path is None else ()

    def makes(self, config: Config) -> Sequence[Artifact]:
        return (Artifact("policy", "export"),) if config.checkpoints.export else ()

    def inputs(self, config: Config) -> Inputs:
        reward, evaluation = config.reward, config.evaluation
        rules = {rule.function for rule in reward.rules} if isinstance(reward, RulesRewardConfig) else set()
        rules |= {evaluation.gold} if evaluation.gold and evaluation.prompts else set()
        return Inputs(
            models={
                "reward.path": reward.path if isinstance(reward, ModelRewardConfig) else None,
                "critic.path": config.critic.path,
                "reference.path": config.reference.path,
            },
            rules=frozenset(rules),
        )

    def models(self, config: Config) -> Iterable[ModelUse]:
        longest, reward = config.model.max_length, _model_reward(config)
        yield policy_use(config, exports=True)
        if config.reference.path is not None:
            yield ModelUse("reference.path", config.reference.path, scores=False, window=longest)
        if reward is not None and reward.path is not None:
            # That it has a head is checked with its statistics.
            yield ModelUse("reward.path", reward.path, scores=True, window=None)
        if config.algorithm.needs_critic:
            yield _critic_use(config)

    def plan(self, config: Config, nodes: Sequence[Node]) -> Plan:
        return place(all_demands(config), nodes, mode=config.placement.mode)

    def arithmetic(self, config: Config, prepared: Prepared) -> Sequence[Row]:
        return imported("jobs.check.batches:batch_rows")(config, len(prepared.prompts.train))  # type: ignore[no-any-return]

    def seconds(self, costs: Costs, prepared: Prepared) -> float:
        return costs.rl(prepared.prompts.train, prepared.prompts.held_out)

    def is_finished(self, config: Config, run: RunFolder) -> bool:
        """Its last step is saved and exported. A finished run can be extended by more steps."""
        made = all((run.place / made.path).exists() for made in self.makes(config))
        told = has_finished(run.path, run.stage or self.kind)
        return made and told and is_complete(run.checkpoints, config.rl.steps)

    async def run(self, job: StageJob) -> Mapping[str, Any]:
        return await imported("jobs.stages.rl_training:train_policy")(job)  # type: ignore[no-any-return]


def _model_reward(config: Config) -> ModelRewardConfig | None:
    return config.reward if isinstance(config.reward, ModelRewardConfig) else None


def _critic_use(config: Config) -> ModelUse:
    reward = _model_reward(config)
    starts = (
        ("critic.path", config.critic.path),
        ("reward.path", reward.path if reward else None),
        ("reward_model.base", config.reward_model.base if reward else None),
        ("model.path", config.model.path),
    )
    key, path = next((key, path) for key, path in starts if path is not None)
    return ModelUse(
        f"critic ({key})",
        path,
        scores=True,
        window=config.model.max_length,
        checkpointing=config.critic.gradient_checkpointing,
    )
