"""Stage `select`: chooses among scored samples what is learned next (rejection sampling, RAFT: Dong 2023), or makes
preferences of them (iterative preference learning)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jobs.stages.preferences import PREFERENCES
from jobs.stages.sample import SAMPLES
from jobs.stages.score import SCORES
from jobs.stages.sft import DEMONSTRATIONS
from jobs.stages.stage import Artifact, Stage
from orchestrator.config.config import Config


class Select(Stage):
    kind = "select"
    start_s = 0.0
    sections = ("select",)

    def reads(self, config: Config) -> Sequence[str]:
        return (SAMPLES, SCORES)

    def makes(self, config: Config) -> Sequence[Artifact]:
        if config.select.keep in ("best", "top"):
            return (Artifact(DEMONSTRATIONS, "selected.jsonl"),)
        return (Artifact(PREFERENCES, "selected.jsonl"),)

    def problems(self, config: Config) -> Iterable[str]:
        needs_two = config.select.keep in ("pairs", "rankings")
        if needs_two and config.sample.samples_per_prompt < 2:
            yield (
                f"select.keep={config.select.keep} compares replies to one prompt, and sample.samples_per_prompt=1: "
                "raise it."
            )
