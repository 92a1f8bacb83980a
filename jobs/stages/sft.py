"""Stage `sft`: supervised fine-tuning of the policy on demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from jobs.command import imported
from jobs.stages.stage import POLICY, Artifact, Costs, Inputs, RowSizes
from jobs.stages.trainings import PolicyTrainingStage
from orchestrator.config.config import Config

if TYPE_CHECKING:
    from jobs.prepare import Prepared

DEMONSTRATIONS = "demonstrations"
RESULT_FILE = "sft.json"


class Sft(PolicyTrainingStage):
    kind = "sft"
    sections = ("sft", "demonstrations")
    leaves = (RESULT_FILE,)
    checks = ("jobs.check.demonstrations:check_demonstrations",)
    instead = MappingProxyType({DEMONSTRATIONS: "give a file of conversations: demonstrations.path"})

    def reads(self, config: Config) -> Sequence[str]:
        return (DEMONSTRATIONS,) if config.demonstrations.path is None else ()

    def makes(self, config: Config) -> Sequence[Artifact]:
        return (Artifact(POLICY, "sft"),)

    def inputs(self, config: Config) -> Inputs:
        return Inputs(files={"demonstrations.path": config.demonstrations.path})

    def rows(self, config: Config, prepared: Prepared) -> RowSizes:
        found: RowSizes = imported("jobs.stages.work.data.demonstrations:sizes")(config, prepared)
        return found

    def seconds(self, costs: Costs, prepared: Prepared) -> float:
        return costs.sft(self.rows(costs.config, prepared))
