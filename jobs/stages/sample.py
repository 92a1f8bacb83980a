"""Stage `sample`: samples replies of the policy, to be ranked, scored or learned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from jobs.stages.stage import Artifact, Costs, ModelUse, Sizes, Stage
from orchestrator.config.config import Config
from orchestrator.planning.demands import engine_demand
from orchestrator.planning.disk import Disk, samples_disk
from orchestrator.planning.placement import Node, Plan, place

if TYPE_CHECKING:
    from jobs.prepare import Prepared
    from orchestrator.types import Prompt

SAMPLES = "samples"


class Sample(Stage):
    kind = "sample"
    start_s = 20.0
    sections = ("sample", "prompts", "rollout")
    samples = True
    starts_from_policy = True
    checks = ("jobs.check.prompts:enough_to_sample",)

    def makes(self, config: Config) -> Sequence[Artifact]:
        return (Artifact(SAMPLES, "samples.parquet"),)

    def models(self, config: Config) -> Iterable[ModelUse]:
        return (policy_use(config, exports=False),)

    def plan(self, config: Config, nodes: Sequence[Node]) -> Plan:
        return place([engine_demand(config)], nodes, mode=config.placement.mode)

    def disk(self, config: Config, sizes: Sizes) -> Disk:
        sample = config.sample
        return samples_disk(sample.prompts * sample.samples_per_prompt, config.model.max_length)

    def seconds(self, costs: Costs, prepared: Prepared) -> float:
        sample = costs.config.sample
        return costs.sampling(prompts_of(costs.config, prepared)[: sample.prompts], sample.samples_per_prompt)


def prompts_of(config: Config, prepared: Prepared) -> Sequence[Prompt]:
    """The prompts of `sample.split`."""
    found: Sequence[Prompt] = getattr(prepared.prompts, config.sample.split)
    return found


def policy_use(config: Config, *, exports: bool) -> ModelUse:
    return ModelUse(
        "model.path",
        config.model.path,
        scores=False,
        window=config.model.max_length,
        checkpointing=config.policy.gradient_checkpointing,
        exports=exports,
    )
