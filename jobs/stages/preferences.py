"""Stage `preferences`: ranks sampled replies by a gold rule with noise, which replaces people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from jobs.stages.sample import SAMPLES, refuse_episodes
from jobs.stages.stage import Artifact, Inputs, Stage
from orchestrator.config.config import Config

PREFERENCES = "preferences"


class Preferences(Stage):
    kind = "preferences"
    start_s = 0.0
    sections = ("labeller",)
    checks = ("jobs.check.rewards:check_labeller",)

    def reads(self, config: Config) -> Sequence[str]:
        return (SAMPLES,)

    def makes(self, config: Config) -> Sequence[Artifact]:
        return (Artifact(PREFERENCES, "preferences.jsonl"),)

    def problems(self, config: Config) -> Iterable[str]:
        if config.sample.samples_per_prompt < 2:
            yield "stage 'preferences' ranks replies to one prompt, and sample.samples_per_prompt=1: raise it."

    def misfits(self, config: Config, read: Mapping[str, Artifact]) -> Iterable[str]:
        return refuse_episodes("stage 'preferences'", read)

    def inputs(self, config: Config) -> Inputs:
        return Inputs(rules=frozenset({config.labeller.gold}))
