"""Stage `preferences`: ranks sampled replies by a gold rule with noise, which replaces people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jobs.command import imported
from jobs.stages.sample import SAMPLES
from jobs.stages.stage import Artifact, Inputs, Stage, StageJob
from orchestrator.config.config import Config

PREFERENCES = "preferences"


class Preferences(Stage):
    kind = "preferences"
    start_s = 0.0
    checks = ("jobs.check.rewards:check_labeller",)

    def reads(self, config: Config) -> Sequence[str]:
        return (SAMPLES,)

    def makes(self, config: Config) -> Sequence[Artifact]:
        return (Artifact(PREFERENCES, "preferences.jsonl"),)

    def inputs(self, config: Config) -> Inputs:
        return Inputs(rules=frozenset({config.labeller.gold}))

    async def run(self, job: StageJob) -> Mapping[str, Any]:
        return await imported("jobs.stages.labelling:make_preferences")(job)  # type: ignore[no-any-return]
