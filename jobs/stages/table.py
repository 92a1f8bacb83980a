"""The table of stages, and the stages of a config: in order, each with its own config and inputs."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jobs.stages.evaluate import Evaluate
from jobs.stages.people import People
from jobs.stages.preference import Preference
from jobs.stages.preferences import Preferences
from jobs.stages.reward_model import RewardModel
from jobs.stages.rl import Rl
from jobs.stages.sample import Sample
from jobs.stages.score import ScoreSamples
from jobs.stages.select import Select
from jobs.stages.sft import Sft
from jobs.stages.stage import POLICY, Artifact, Stage
from orchestrator.config.changes import CONTENTS
from orchestrator.config.config import Config
from orchestrator.config.loader import changed
from orchestrator.config.stages import OLD_KINDS, StageEntry
from orchestrator.errors import ConfigError
from orchestrator.run.folder import RunFolder, stage_place

_MAKING_DATA = (Sample(), ScoreSamples(), Select(), Preferences(), People())
_LEARNING = (Sft(), RewardModel(), Preference(), Rl())
STAGES: dict[str, Stage] = {stage.kind: stage for stage in (*_MAKING_DATA, *_LEARNING, Evaluate())}


@dataclass(frozen=True)
class NamedStage:
    """A stage of one run. `sources` says, by kind of artifact, which earlier stage makes its inputs."""

    name: str
    stage: Stage
    config: Config
    sources: Mapping[str, NamedStage]

    @property
    def outside(self) -> frozenset[str]:
        """The keys of run.contents whose files it reads."""
        found = self.stage.inputs(self.config)
        keys = {*found.files, *found.models, *(f"rule {rule}" for rule in found.rules)}
        if self.stage.samples:
            keys.add("prompts.path")
        if self.stage.starts_from_policy:
            keys |= {"model.chat_template", *(() if POLICY in self.sources else ("model.path",))}
        known = self.config.run.contents
        return frozenset(own if (own := own_name(key, self.name)) in known else key for key in keys)

    def sees(self, key: str) -> bool:
        """Whether a key of the config can affect its results. A section that some kinds of stages name is seen by these
        only; a kind that names none sees all."""
        if key.startswith(CONTENTS):
            return key.removeprefix(CONTENTS) in self.outside
        section = key.partition(".")[0]
        others = {other.kind for other in STAGES.values() if section in other.sections}
        return not self.stage.sections or not others or self.stage.kind in others

    def files(self, run: RunFolder) -> list[Path]:
        """All files and folders that it has written, results first: without them it is not finished."""
        place = self.of(run).place
        made = [made.path for made in self.stage.makes(self.config)]
        names = (*self.stage.leaves, *made, *(f".{name}.work" for name in made))
        found = [place] if place != run.path else [place / name for name in dict.fromkeys(names)]
        return [path for path in found if path.exists()]

    def of(self, run: RunFolder) -> RunFolder:
        """The run's folder with this stage's paths."""
        return run if self.name == self.stage.kind else replace(run, stage=self.name)

    def is_finished(self, run: RunFolder) -> bool:
        return self.stage.is_finished(self.config, self.of(run))

    def artifact(self, kind: str, run: RunFolder) -> Path:
        """The path of one of its artifacts."""
        return self.of(run).place / self.made(kind).path

    def made(self, kind: str) -> Artifact:
        return next(made for made in self.stage.makes(self.config) if made.kind == kind)

    def inputs(self, run: RunFolder) -> dict[str, Path]:
        """Artifacts that it reads, by kind."""
        return {kind: source.artifact(kind, run) for kind, source in self.sources.items()}

    def config_in(self, run: RunFolder) -> Config:
        """Its config, in which `model.path` is the policy that an earlier stage makes."""
        policy = self.inputs(run).get(POLICY)
        if policy is None:
            return self.config
        keys = ["model.path", *(["critic.path"] if self.config.critic.path == self.config.model.path else [])]
        return changed(self.config, dict.fromkeys(keys, str(policy)), source=f"stage {self.name!r}")


def own_name(key: str, stage: str) -> str:
    """The name in run.contents of a file that one stage reads where others read another one under the same key."""
    return f"{key} of {stage}"


def stages_of(config: Config) -> list[NamedStage]:
    """The stages of a run in order.

    Raises:
        ConfigError: a stage is not in the table, occurs twice under one name, reads what no earlier stage makes, or has
            keys that contradict each other.
    """
    named: list[NamedStage] = []
    makers: dict[str, NamedStage] = {}
    for entry in config.stages:
        found = _named(config, entry, makers)
        if any(other.name == found.name for other in named):
            raise ConfigError(
                f"stages: {found.name!r} occurs twice. Give one of them a unique name: "
                f"{{name: {found.name}-2, kind: {found.stage.kind}}}."
            )
        named.append(found)
        makers |= {made.kind: found for made in found.stage.makes(found.config)}
    return named


def _named(config: Config, entry: StageEntry, makers: Mapping[str, NamedStage]) -> NamedStage:
    stage = STAGES.get(entry.kind)
    if entry.kind in OLD_KINDS:
        raise ConfigError(f"stages: {entry.kind!r} is now called {OLD_KINDS[entry.kind]!r}.")
    if stage is None:
        near = difflib.get_close_matches(entry.kind, STAGES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(STAGES)}."
        raise ConfigError(f"stages: unknown stage {entry.kind!r}; {hint}")
    mine = changed(config, entry.set, source=f"stages: set of {entry.name!r}") if entry.set else config
    missing = [kind for kind in stage.reads(mine) if kind not in makers]
    for kind in missing:
        able = [other.kind for other in STAGES.values() if any(made.kind == kind for made in other.makes(mine))]
        raise ConfigError(
            f"stage {entry.name!r} reads {kind}, which no stage before it makes: put {' or '.join(map(repr, able))} "
            f"before it in stages{_without(stage, kind)}."
        )
    for problem in stage.problems(mine):
        raise ConfigError(problem)
    optional = (*stage.may_read(mine), *((POLICY,) if stage.starts_from_policy else ()))
    wanted = (*stage.reads(mine), *(kind for kind in optional if kind in makers))
    sources = {kind: makers[kind] for kind in wanted}
    for problem in stage.misfits(mine, {kind: source.made(kind) for kind, source in sources.items()}):
        raise ConfigError(problem)
    return NamedStage(entry.name, stage, mine, sources)


def _without(stage: Stage, kind: str) -> str:
    way_out = stage.instead.get(kind)
    return f", or {way_out}" if way_out else ""


def samples_prompts(config: Config) -> bool:
    """Whether any stage starts rollout engines on the run's prompts."""
    return any(entry.stage.samples for entry in stages_of(config))


def logged_stage(config: Config) -> NamedStage | None:
    """The last stage that learns in steps from an experience log."""
    return next((entry for entry in reversed(stages_of(config)) if entry.stage.has_log), None)


def named_kinds(stages: Any) -> dict[str, str]:
    """Name to kind, of `stages` in a file, which may be damaged or of an earlier version."""
    found: dict[str, str] = {}
    for entry in stages if isinstance(stages, list) else ():
        tree = entry if isinstance(entry, Mapping) else {"kind": entry}
        kind, name = str(tree.get("kind")), str(tree.get("name", tree.get("kind")))
        found[OLD_KINDS.get(name, name)] = OLD_KINDS.get(kind, kind)
    return found


def logged_name(stages: Mapping[str, str]) -> str | None:
    """The name of the last stage that learns in steps from an experience log, of `named_kinds`."""
    names = [name for name, kind in stages.items() if kind in STAGES and STAGES[kind].has_log]
    return names[-1] if names else None


def logged_place(run: Path, stages: Mapping[str, str]) -> Path:
    """The folder with the log, checkpoints and evaluations of that stage; without one, the run's."""
    name = logged_name(stages)
    return stage_place(run, "" if name is None or name == stages[name] else name)


def num_steps_of(kind: str, tree: Mapping[str, Any]) -> Any:
    """The number of steps of a kind of stage, in the tree of a config file."""
    value: Any = tree
    for part in STAGES[kind].steps_key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def to_do(stages: Sequence[NamedStage], run: RunFolder) -> Iterator[NamedStage]:
    """Stages that must run: neither finished ones, nor those whose artifacts only finished stages read."""
    needed: set[str] = set()
    chosen: list[NamedStage] = []
    read = {source.name for entry in stages for source in entry.sources.values()}
    for entry in reversed(stages):
        is_wanted = entry.name in needed or entry.name not in read
        if is_wanted and not entry.is_finished(run):
            chosen.append(entry)
            needed |= {source.name for source in entry.sources.values()}
    yield from reversed(chosen)
