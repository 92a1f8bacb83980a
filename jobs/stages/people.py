"""Stage `people`: waits until people have judged the samples, and makes preferences of their judgements."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jobs.stages.preferences import PREFERENCES
from jobs.stages.sample import SAMPLES
from jobs.stages.stage import Artifact, Stage
from orchestrator.config.config import Config

JUDGEMENTS = "judgements"
STATE_FILE = "people.json"


class People(Stage):
    """It holds no actors. Judgements of earlier rounds are part of what it makes."""

    kind = "people"
    start_s = 5.0
    sections = ("people",)
    uses = (JUDGEMENTS,)
    leaves = (STATE_FILE,)
    checks = ("jobs.check.people:check_people",)

    def reads(self, config: Config) -> Sequence[str]:
        return (SAMPLES,)

    def makes(self, config: Config) -> Sequence[Artifact]:
        return (Artifact(JUDGEMENTS, "judgements.jsonl"), Artifact(PREFERENCES, "people.jsonl"))

    def problems(self, config: Config) -> Iterable[str]:
        if config.sample.samples_per_prompt < 2:
            yield "stage 'people' compares replies to one prompt, and sample.samples_per_prompt=1: raise it."
        rounds = sum(entry.kind == self.kind for entry in config.stages)
        if rounds > 1 and config.preferences.held_out is not None:
            yield (
                f"preferences.held_out={config.preferences.held_out} holds out the end of a file, which grows in each "
                f"of {rounds} rounds, so later rounds would train on what earlier ones measured. Set it to null: then "
                "all rounds hold out the same prompts."
            )
