"""Stage `sample`: samples replies of the policy, to be ranked, scored or learned; with an environment, episodes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from jobs.stages.rewarding import environments
from jobs.stages.stage import Artifact, Costs, Inputs, ModelUse, RowSizes, Sizes, Stage, row_sizes
from orchestrator.config.config import Config
from orchestrator.planning.demands import engine_demand
from orchestrator.planning.disk import Disk, samples_disk
from orchestrator.planning.placement import Node, Plan, place

if TYPE_CHECKING:
    from jobs.prepare import Prepared
    from orchestrator.types import Prompt

SAMPLES = "samples"
EXPERIENCE = "experience"
"""The last step of a stage's log: its manifest, which names and seals the files of the samples."""
EPISODES = "episodes"
"""What samples hold if they were drawn with an environment."""


class Sample(Stage):
    kind = "sample"
    start_s = 20.0
    sections = ("environment", "sample", "prompts", "rollout")
    samples = True
    starts_from_policy = True
    checks = ("jobs.check.prompts:enough_to_sample", "jobs.check.environments:check_environment")

    def makes(self, config: Config) -> Sequence[Artifact]:
        return (Artifact(SAMPLES, "samples.parquet", holds=EPISODES if config.environment.name else ""),)

    def inputs(self, config: Config) -> Inputs:
        return Inputs(rules=environments(config))

    def models(self, config: Config) -> Iterable[ModelUse]:
        return (policy_use(config, exports=False),)

    def plan(self, config: Config, nodes: Sequence[Node]) -> Plan:
        return place([engine_demand(config)], nodes, mode=config.placement.mode)

    def disk(self, config: Config, sizes: Sizes) -> Disk:
        sample = config.sample
        return samples_disk(sample.prompts * sample.samples_per_prompt, config.model.max_length)

    def seconds(self, costs: Costs, prepared: Prepared) -> float:
        return costs.sampling(sampled(costs.config, prepared), costs.config.sample.samples_per_prompt)


def refuse_episodes(what: str, read: Mapping[str, Artifact]) -> Iterator[str]:
    """The problem of comparing replies where samples are episodes. `what` compares them."""
    if EXPERIENCE in read and read[EXPERIENCE].holds == EPISODES:
        yield f"{what} compares single replies, and with environment.name the log holds episodes of several turns."
    if SAMPLES in read and read[SAMPLES].holds == EPISODES:
        yield (
            f"{what} compares single replies, and with environment.name the samples are episodes of several turns. "
            "Learn the best ones (stages sample, score, select and sft with select.keep=best or top), or sample "
            "replies: {kind: sample, set: {environment.name: null}}."
        )


def prompts_of(config: Config, prepared: Prepared) -> Sequence[Prompt]:
    """The prompts of `sample.split`."""
    found: Sequence[Prompt] = getattr(prepared.prompts, config.sample.split)
    return found


def sampled(config: Config, prepared: Prepared) -> Sequence[Prompt]:
    """The prompts for which replies are sampled."""
    return prompts_of(config, prepared)[: config.sample.prompts]


def sample_sizes(
    config: Config, prompts: Sequence[Prompt], *, num_rows: int, num_records: int | None = None
) -> RowSizes:
    """The data of a training on samples, for estimates: replies are as long as they may be. `num_records` None: a row
    is a record."""
    longest = config.longest_response
    measured = [(len(prompt.tokens) + longest, longest) for prompt in prompts]
    return row_sizes(measured, num_rows=num_rows, num_records=num_rows if num_records is None else num_records)


def policy_use(config: Config, *, exports: bool) -> ModelUse:
    return ModelUse(
        "model.path",
        config.model.path,
        scores=False,
        window=config.model.max_length,
        checkpointing=config.policy.gradient_checkpointing,
        exports=exports,
    )
