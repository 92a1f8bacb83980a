"""Stage `preference`: trains the policy on preferences, without a reward model (DPO and its kin)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from jobs.command import imported
from jobs.stages.preferences import PREFERENCES
from jobs.stages.stage import POLICY, Artifact, Costs, Inputs, RowSizes
from jobs.stages.trainings import PolicyTrainingStage, unmade_judgements
from orchestrator.config.config import Config
from orchestrator.planning.disk import Disk

if TYPE_CHECKING:
    from jobs.prepare import Prepared

RESULT_FILE = "preference.json"


class Preference(PolicyTrainingStage):
    kind = "preference"
    sections = ("preference", "preferences")
    leaves = (RESULT_FILE,)
    checks = ("jobs.check.rewards:check_preferred", "jobs.check.conversations:check_preferred_conversations")
    instead = MappingProxyType({PREFERENCES: "give a preference file: preferences.path"})

    def reads(self, config: Config) -> Sequence[str]:
        return (PREFERENCES,) if config.preferences.path is None else ()

    def makes(self, config: Config) -> Sequence[Artifact]:
        return (Artifact(POLICY, "preferred"),)

    def problems(self, config: Config) -> Iterable[str]:
        yield from unmade_judgements(config, self.kind, config.preference.loss, "dpo")
        yield from super().problems(config)

    def inputs(self, config: Config) -> Inputs:
        return Inputs(files={"preferences.path": config.preferences.path})

    def rows(self, config: Config, prepared: Prepared) -> RowSizes:
        found: RowSizes = imported("jobs.stages.work.preference:sizes")(config, prepared)
        return found

    def rows_disk(self, config: Config, prepared: Prepared) -> Disk:
        """With the mismatched rows of KTO, as many in every epoch."""
        once, stage = super().rows_disk(config, prepared).working, config.preference
        return Disk(working=once * (1 + stage.epochs * (stage.loss.judgement == "labels")))

    def seconds(self, costs: Costs, prepared: Prepared) -> float:
        return costs.preference(self.rows(costs.config, prepared))
