"""Stage `people`: waits until people have judged the samples, and makes preferences of their judgements."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from jobs.stages.preferences import PREFERENCES
from jobs.stages.reward_model import RewardModel
from jobs.stages.sample import EXPERIENCE, SAMPLES, refuse_episodes
from jobs.stages.stage import Artifact, Sizes, Stage
from orchestrator.config.config import Config
from orchestrator.planning.demands import REWARD_MODEL, states_demand
from orchestrator.planning.disk import Disk
from orchestrator.planning.placement import Node, Plan, place

JUDGEMENTS = "judgements"
STATE_FILE, ASKED_FILE, STATES_FILE = "people.json", "asked.json", "states.parquet"
_HEADS = "reward_model.heads"
_BYTES_PER_VALUE = 4.0


class People(Stage):
    """It holds no actors while it waits. Judgements of earlier rounds are part of what it makes.

    The sections of the reward are not its own: what people have judged is not set aside because a key of them changes.
    The reward model itself is an artifact that it reads.
    """

    kind = "people"
    start_s = 5.0
    sections = ("people",)
    uses = (JUDGEMENTS,)
    leaves = (STATE_FILE, ASKED_FILE, STATES_FILE, f".{STATES_FILE}.work")
    checks = ("jobs.check.people:check_people",)

    def reads(self, config: Config) -> Sequence[str]:
        return (source_of(config),)

    def may_read(self, config: Config) -> Sequence[str]:
        return (*self.uses, REWARD_MODEL) if _is_active(config) else self.uses

    def makes(self, config: Config) -> Sequence[Artifact]:
        return (Artifact(JUDGEMENTS, "judgements.jsonl"), Artifact(PREFERENCES, "people.jsonl"))

    def problems(self, config: Config) -> Iterable[str]:
        _, num_replies, key = asked_of(config)
        if num_replies < 2:
            yield f"stage 'people' compares replies to one prompt, and {key}.samples_per_prompt=1: raise it."
        rounds = sum(entry.kind == self.kind for entry in config.stages)
        if rounds > 1 and config.preferences.held_out is not None:
            yield (
                f"preferences.held_out={config.preferences.held_out} holds out the end of a file, which grows in each "
                f"of {rounds} rounds, so later rounds would train on what earlier ones measured. Set it to null: then "
                "all rounds hold out the same prompts."
            )
        if _is_active(config):
            yield from _unable_to_choose(config)

    def misfits(self, config: Config, read: Mapping[str, Artifact]) -> Iterable[str]:
        return refuse_episodes("stage 'people'", read)

    def plan(self, config: Config, nodes: Sequence[Node]) -> Plan:
        """Of what reads the reward model before the wait."""
        demands = [states_demand(config)] if _is_active(config) else []
        return place(demands, nodes, mode=config.placement.mode) if demands else Plan(())

    def disk(self, config: Config, sizes: Sizes) -> Disk:
        """States and scores of all samples."""
        if not _is_active(config):
            return Disk()
        size = sizes.of(*RewardModel().initial_model(config))
        values = size.hidden + config.reward_model.heads
        num_prompts, num_replies, _ = asked_of(config)
        return Disk(_BYTES_PER_VALUE * values * num_prompts * num_replies)


def source_of(config: Config) -> str:
    """The kind of artifact whose samples people judge."""
    return EXPERIENCE if config.people.source == "log" else SAMPLES


def asked_of(config: Config) -> tuple[int, int, str]:
    """The most prompts that a round can ask for, the replies to each, and the section that says so."""
    if config.people.source == "log":
        return config.rl.prompts_per_step, config.rl.samples_per_prompt, "rl"
    return config.sample.prompts, config.sample.samples_per_prompt, "sample"


def _is_active(config: Config) -> bool:
    return config.people.choose == "active"


def _unable_to_choose(config: Config) -> Iterator[str]:
    way_out = "or people.choose=random"
    if config.people.items is None:
        yield f"people.choose=active needs people.items, the number of items that a round asks for: give it, {way_out}."
    kinds = [entry.kind for entry in config.stages]
    last = max((place for place, kind in enumerate(kinds) if kind == People.kind), default=0)
    trained = [entry for entry in config.stages[:last] if entry.kind == REWARD_MODEL]
    if not trained:
        yield (
            "people.choose=active chooses by the reward model of an earlier round, and no stage 'reward_model' comes "
            "before a stage 'people': repeat them, {rounds: 2, stages: [sample, people, reward_model, rl]}, "
            f"{way_out}."
        )
    if any(entry.set.get(_HEADS, config.reward_model.heads) < 2 for entry in trained):
        yield (
            f"people.choose=active chooses that on which the reward model's heads disagree, and {_HEADS}=1 makes one "
            f"head: set {_HEADS}=5, {way_out}."
        )
