"""Stage `preference`: trains the policy on preferences, without a reward model (DPO and its kin)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from jobs.command import imported
from jobs.stages.preferences import PREFERENCES
from jobs.stages.stage import POLICY, Artifact, Costs, Inputs, ModelUse, Sizes, Stage
from orchestrator.config.config import Config
from orchestrator.planning.demands import PREFERENCE, plan_training
from orchestrator.planning.disk import Disk, training_disk
from orchestrator.planning.placement import Node, Plan
from orchestrator.run.folder import RunFolder

if TYPE_CHECKING:
    from jobs.prepare import Prepared

RESULT_FILE = "preference.json"


class Preference(Stage):
    kind = "preference"
    start_s = 25.0
    sections = ("preference", "preferences")
    leaves = (RESULT_FILE,)
    starts_from_policy = True
    checks = ("jobs.check.rewards:check_preferred", "jobs.check.conversations:check_preferred_conversations")
    instead = MappingProxyType({PREFERENCES: "give a preference file: preferences.path"})

    def reads(self, config: Config) -> Sequence[str]:
        return (PREFERENCES,) if config.preferences.path is None else ()

    def makes(self, config: Config) -> Sequence[Artifact]:
        return (Artifact(POLICY, "preferred"),)

    def problems(self, config: Config) -> Iterable[str]:
        loss = config.preference.loss
        if config.preferences.path is None and loss.judgement != "rankings":
            yield (
                f"preference.loss.name={loss.name!r} learns {loss.judgement}, which no stage makes: give a file of "
                "them, preferences.path, or choose preference.loss.name=dpo."
            )
        if config.preference.max_length > config.model.max_length:
            yield (
                f"preference.max_length={config.preference.max_length} exceeds the policy's window model.max_length="
                f"{config.model.max_length}: raise that, or lower preference.max_length."
            )

    def inputs(self, config: Config) -> Inputs:
        return Inputs(files={"preferences.path": config.preferences.path})

    def models(self, config: Config) -> Iterable[ModelUse]:
        section = config.preference
        yield ModelUse(
            "model.path",
            config.model.path,
            scores=False,
            window=section.max_length,
            window_key="preference.max_length",
            checkpointing=section.gradient_checkpointing,
            exports=True,
        )

    def plan(self, config: Config, nodes: Sequence[Node]) -> Plan:
        return plan_training(PREFERENCE, config.preference, nodes)

    def disk(self, config: Config, sizes: Sizes) -> Disk:
        size = sizes.of(config.model.path)
        return training_disk(size.num_params, saves=config.preference.checkpoint_every_steps > 0)

    def seconds(self, costs: Costs, prepared: Prepared) -> float:
        return costs.preference(imported("jobs.stages.work.preference:sizes")(costs.config, prepared))

    def is_finished(self, config: Config, run: RunFolder) -> bool:
        return (run.place / RESULT_FILE).exists()
