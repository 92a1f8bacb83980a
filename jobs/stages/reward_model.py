"""Stage `reward_model`: trains a reward model on ranked replies and measures it on held-out ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from jobs.command import imported
from jobs.stages.preferences import PREFERENCES
from jobs.stages.stage import Artifact, Costs, Inputs, ModelUse, Stage, StageJob
from orchestrator.config.config import Config
from orchestrator.planning.demands import REWARD_MODEL, plan_reward_model
from orchestrator.planning.placement import Node, Plan
from orchestrator.run.folder import RunFolder

if TYPE_CHECKING:
    from jobs.prepare import Prepared

RESULT_FILE = "reward_model.json"


class RewardModel(Stage):
    kind = "reward_model"
    start_s = 25.0
    checks = ("jobs.check.rewards:check_preferences", "jobs.check.conversations:check_training_conversations")
    instead = MappingProxyType({PREFERENCES: "give a preference file: preferences.path"})

    def reads(self, config: Config) -> Sequence[str]:
        return (PREFERENCES,) if config.preferences.path is None else ()

    def makes(self, config: Config) -> Sequence[Artifact]:
        return (Artifact(REWARD_MODEL, "reward-model"),)

    def inputs(self, config: Config) -> Inputs:
        return Inputs(
            files={"preferences.path": config.preferences.path}, models={"reward_model.base": config.reward_model.base}
        )

    def models(self, config: Config) -> Iterable[ModelUse]:
        section = config.reward_model
        base = section.base or config.model.path
        return (ModelUse("reward_model.base", base, scores=True, window=None, exports=True, layers=section.layers),)

    def plan(self, config: Config, nodes: Sequence[Node]) -> Plan:
        return plan_reward_model(config, nodes)

    def seconds(self, costs: Costs, prepared: Prepared) -> float:
        return costs.reward_model(prepared.prompts.reward_model)

    def is_finished(self, config: Config, run: RunFolder) -> bool:
        return (run.place / RESULT_FILE).exists()

    async def run(self, job: StageJob) -> Mapping[str, Any]:
        return await imported("jobs.stages.reward_model_training:make_reward_model")(job)  # type: ignore[no-any-return]
