"""Stage `reward_model`: trains a reward model on ranked replies and measures it on held-out ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from jobs.command import imported
from jobs.stages.preferences import PREFERENCES
from jobs.stages.stage import Artifact, Costs, Inputs, ModelUse, RowSizes
from jobs.stages.trainings import TrainingStage, unmade_judgements
from orchestrator.config.config import Config
from orchestrator.planning.demands import REWARD_MODEL

if TYPE_CHECKING:
    from jobs.prepare import Prepared

RESULT_FILE = "reward_model.json"


class RewardModel(TrainingStage):
    kind = REWARD_MODEL
    sections = ("reward_model", "preferences")
    leaves = (RESULT_FILE,)
    checks = ("jobs.check.rewards:check_rewarded", "jobs.check.conversations:check_training_conversations")
    instead = MappingProxyType({PREFERENCES: "give a preference file: preferences.path"})

    def reads(self, config: Config) -> Sequence[str]:
        return (PREFERENCES,) if config.preferences.path is None else ()

    def makes(self, config: Config) -> Sequence[Artifact]:
        return (Artifact(REWARD_MODEL, "reward-model"),)

    def problems(self, config: Config) -> Iterable[str]:
        return unmade_judgements(config, self.kind, config.reward_model.loss, "pairwise")

    def inputs(self, config: Config) -> Inputs:
        return Inputs(
            files={"preferences.path": config.preferences.path}, models={"reward_model.base": config.reward_model.base}
        )

    def initial_model(self, config: Config) -> tuple[str, int | None]:
        return config.reward_model.base or config.model.path, config.reward_model.layers

    def models(self, config: Config) -> Iterable[ModelUse]:
        base, layers = self.initial_model(config)
        use = ModelUse("reward_model.base", base, scores=True, window=None, exports=True, layers=layers)
        return (replace(use, heads=config.reward_model.heads, lora=config.reward_model.lora),)

    def rows(self, config: Config, prepared: Prepared) -> RowSizes:
        found: RowSizes = imported("jobs.stages.work.reward_model:sizes")(config, prepared)
        return found

    def seconds(self, costs: Costs, prepared: Prepared) -> float:
        return costs.reward_model(prepared.prompts.reward_model)
