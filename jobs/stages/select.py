"""Stage `select`: chooses among scored samples what is learned next (rejection sampling, RAFT: Dong 2023), or makes
preferences of them (iterative preference learning)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from jobs.stages.preferences import PREFERENCES
from jobs.stages.sample import SAMPLES, refuse_episodes
from jobs.stages.score import SCORES
from jobs.stages.sft import DEMONSTRATIONS
from jobs.stages.stage import Artifact, Stage
from orchestrator.config.config import Config

_COMPARES = ("pairs", "rankings")


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
        if config.select.keep in _COMPARES and config.sample.samples_per_prompt < 2:
            yield (
                f"select.keep={config.select.keep} compares replies to one prompt, and sample.samples_per_prompt=1: "
                "raise it."
            )

    def misfits(self, config: Config, read: Mapping[str, Artifact]) -> Iterable[str]:
        keep = config.select.keep
        return refuse_episodes(f"select.keep={keep}", read) if keep in _COMPARES else ()
