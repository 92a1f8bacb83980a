"""Stage `reward_model`: trains a reward model on ranked replies and measures it on held-out ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from jobs.stages.preferences import PREFERENCES
from jobs.stages.stage import Artifact, Costs, Inputs, ModelUse, Sizes, Stage
from orchestrator.config.config import Config
from orchestrator.planning.demands import REWARD_MODEL, plan_training
from orchestrator.planning.disk import Disk, training_disk
from orchestrator.planning.placement import Node, Plan
from orchestrator.run.folder import RunFolder

if TYPE_CHECKING:
    from jobs.prepare import Prepared

RESULT_FILE = "reward_model.json"


class RewardModel(Stage):
    kind = "reward_model"
    start_s = 25.0
    sections = ("reward_model", "preferences")
    leaves = (RESULT_FILE,)
    starts_from_policy = True
    checks = ("jobs.check.rewards:check_rewarded", "jobs.check.conversations:check_training_conversations")
    instead = MappingProxyType({PREFERENCES: "give a preference file: preferences.path"})

    def reads(self, config: Config) -> Sequence[str]:
        return (PREFERENCES,) if config.preferences.path is None else ()

    def makes(self, config: Config) -> Sequence[Artifact]:
        return (Artifact(REWARD_MODEL, "reward-model"),)

    def problems(self, config: Config) -> Iterable[str]:
        loss = config.reward_model.loss
        if config.preferences.path is None and loss.judgement != "rankings":
            yield (
                f"reward_model.loss.name={loss.name!r} learns {loss.judgement}, which no stage makes: give a file of "
                "them, preferences.path, or choose reward_model.loss.name=pairwise."
            )

    def inputs(self, config: Config) -> Inputs:
        return Inputs(
            files={"preferences.path": config.preferences.path}, models={"reward_model.base": config.reward_model.base}
        )

    def models(self, config: Config) -> Iterable[ModelUse]:
        section = config.reward_model
        base = section.base or config.model.path
        return (ModelUse("reward_model.base", base, scores=True, window=None, exports=True, layers=section.layers),)

    def plan(self, config: Config, nodes: Sequence[Node]) -> Plan:
        return plan_training(REWARD_MODEL, config.reward_model, nodes)

    def disk(self, config: Config, sizes: Sizes) -> Disk:
        section = config.reward_model
        size = sizes.of(section.base or config.model.path, section.layers)
        return training_disk(size.num_params, saves=section.checkpoint_every_steps > 0)

    def seconds(self, costs: Costs, prepared: Prepared) -> float:
        return costs.reward_model(prepared.prompts.reward_model)

    def is_finished(self, config: Config, run: RunFolder) -> bool:
        return (run.place / RESULT_FILE).exists()
