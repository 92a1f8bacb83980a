"""Stage `score`: scores samples, or replies of a file, by the run's reward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from types import MappingProxyType

from jobs.stages.rewarding import INSTEAD, reward_inputs, reward_reads, reward_uses
from jobs.stages.sample import SAMPLES
from jobs.stages.stage import Artifact, Inputs, ModelUse, Stage
from orchestrator.config.config import Config
from orchestrator.planning.demands import reward_demand
from orchestrator.planning.placement import Node, Plan, place

SCORES = "scores"


class ScoreSamples(Stage):
    kind = "score"
    starts_from_policy = True
    start_s = 10.0
    sections = ("environment", "reward", "reward_model", "score")
    checks = (
        "jobs.check.rewards:check_replies",
        "jobs.check.rewards:check_reward",
        "jobs.check.conversations:check_scoring_conversations",
    )
    instead = MappingProxyType({**INSTEAD, SAMPLES: "give a file of replies: score.path"})

    def reads(self, config: Config) -> Sequence[str]:
        return (*(() if config.score.path else (SAMPLES,)), *reward_reads(config))

    def makes(self, config: Config) -> Sequence[Artifact]:
        made = (Artifact(SCORES, "scores.parquet"),)
        return (*made, Artifact(SAMPLES, "replies.parquet")) if config.score.path else made

    def inputs(self, config: Config) -> Inputs:
        reward = reward_inputs(config)
        return replace(reward, files={**reward.files, "score.path": config.score.path})

    def models(self, config: Config) -> Iterable[ModelUse]:
        return reward_uses(config)

    def plan(self, config: Config, nodes: Sequence[Node]) -> Plan:
        return place([reward_demand(config)], nodes, mode=config.placement.mode)
