"""Stage `sample`: samples replies of the start policy to prompts that are set aside, for people or a rule to rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jobs.command import imported
from jobs.stages.stage import Artifact, Costs, ModelUse, Stage, StageJob
from orchestrator.config.config import Config
from orchestrator.planning.demands import engine_demand
from orchestrator.planning.placement import Node, Plan, place

if TYPE_CHECKING:
    from jobs.prepare import Prepared

SAMPLES = "samples"


class Sample(Stage):
    kind = "sample"
    start_s = 20.0
    samples = True
    checks = ("jobs.check.prompts:enough_to_label",)

    def makes(self, config: Config) -> Sequence[Artifact]:
        return (Artifact(SAMPLES, "samples.parquet"),)

    def models(self, config: Config) -> Iterable[ModelUse]:
        return (policy_use(config, exports=False),)

    def plan(self, config: Config, nodes: Sequence[Node]) -> Plan:
        return place([engine_demand(config)], nodes, mode=config.placement.mode)

    def seconds(self, costs: Costs, prepared: Prepared) -> float:
        labeller = costs.config.labeller
        return costs.sampling(prepared.prompts.reward_model[: labeller.prompts], labeller.replies_per_prompt)

    async def run(self, job: StageJob) -> Mapping[str, Any]:
        return await imported("jobs.stages.sampling:make_samples")(job)  # type: ignore[no-any-return]


def policy_use(config: Config, *, exports: bool) -> ModelUse:
    return ModelUse(
        "model.path",
        config.model.path,
        scores=False,
        window=config.model.max_length,
        checkpointing=config.policy.gradient_checkpointing,
        exports=exports,
    )
