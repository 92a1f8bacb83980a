"""`rlhf run --from STAGE` and `--only STAGE`: which stages of a run are run again, and what may change for that."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from jobs.stages.table import NamedStage, stages_of
from orchestrator.config.changes import Change, changed_keys
from orchestrator.config.config import Config
from orchestrator.errors import ConfigError
from orchestrator.run.aside import move_aside, move_lineage, new_aside
from orchestrator.run.folder import RunFolder, existing_run, kept_config
from orchestrator.run.lineage import read_lineage, why_stale
from orchestrator.watching.telemetry import Telemetry


@dataclass(frozen=True)
class Rerun:
    """What of a run is run again.

    Args:
        again: names of the stages whose results are set aside.
        only: the one stage that runs. None: all that are not finished.
    """

    stages: Sequence[NamedStage]
    again: frozenset[str]
    only: str | None = None

    def compare(self, old: Config, new: Config) -> tuple[Change, ...]:
        """What differs from the kept config. It matters if a stage sees it that has begun and is not run again."""
        before, run = {entry.name: entry for entry in stages_of(old)}, existing_run(new)
        kept = [entry for entry in stages_of(new) if entry.name not in self.again and run and entry.files(run)]
        seen = {key for entry in kept for key in _seen(before.get(entry.name), entry)}
        changes = changed_keys(old, new)
        keys = {change.key for change in changes}
        if seen - keys:  # keys that only one stage has, or its inputs
            seen |= keys & {"stages"} or keys
        return tuple(replace(change, matters=change.key in seen) for change in changes)

    def set_aside(self, say: Callable[[str], None], run: RunFolder) -> None:
        """Moves the results of the stages that are run again to a new folder of the run, the last stage's first: if
        this is interrupted, a stage is missing rather than finished with inputs that are gone."""
        chosen = [entry for entry in reversed(self.stages) if entry.name in self.again and entry.files(run)]
        if not chosen:
            return
        aside = new_aside(run.path)
        for entry in chosen:
            with Telemetry(run.path, run.id, run.attempt, stage=entry.name, fence=run.require_newest) as telemetry:
                telemetry.set_aside(aside)
            move_aside(run.path, entry.files(run), aside)
        move_lineage(run.path, [entry.name for entry in chosen], aside)
        names = ", ".join(entry.name for entry in reversed(chosen))
        say(f"set aside what earlier attempts made in {names}: {aside}")


def rerun_of(config: Config, *, begin: str | None, only: str | None) -> Rerun:
    """What one of the options `--from` (`begin`) and `--only` asks for.

    Raises:
        ConfigError: both are given, there is no such stage or run, or what the only stage reads is missing.
    """
    if begin is not None and only is not None:
        raise ConfigError("--from runs all that follows, --only one stage: give one of them.")
    stages, run = stages_of(config), existing_run(config)
    if begin is not None:
        entry = _stage(stages, begin, "--from")
        if run is None:
            raise ConfigError(f"--from {begin} runs a stage of a run again, and run.id={config.run.id} names no run.")
        return Rerun(stages, frozenset(_with_readers(stages, entry.name)))
    entry = _stage(stages, str(only), "--only")
    for kind, source in entry.sources.items():
        if run is None or not source.is_finished(run):
            raise ConfigError(
                f"--only {only}: stage {only!r} reads {kind} of stage {source.name!r}, which has not made it in "
                f"run.id={config.run.id}. Run that first (--only {source.name}), or leave out --only."
            )
    again = frozenset({entry.name} if run is not None and _begins_again(entry, config, run) else ())
    return Rerun(stages, again, entry.name)


def _begins_again(entry: NamedStage, config: Config, run: RunFolder) -> bool:
    """Whether a stage can't continue where it is: it has finished, or it sees a change of the config."""
    kept = kept_config(config)
    before = {other.name: other for other in stages_of(kept)} if kept else {}
    return entry.is_finished(run) or bool(set(_seen(before.get(entry.name), entry)))


def _stage(stages: Sequence[NamedStage], name: str, option: str) -> NamedStage:
    found = {entry.name: entry for entry in stages}
    if name not in found:
        near = difflib.get_close_matches(name, found, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(found)}."
        raise ConfigError(f"{option}: no stage {name!r} is in stages; {hint}")
    return found[name]


def _with_readers(stages: Sequence[NamedStage], name: str) -> set[str]:
    """A stage and all that read from it, at first or second hand."""
    found = {name}
    for entry in stages:  # a stage reads from earlier ones only
        if any(source.name in found for source in entry.sources.values()):
            found.add(entry.name)
    return found


def _seen(before: NamedStage | None, now: NamedStage) -> Iterator[str]:
    """Keys whose change affects a stage; "stages" if it is of another kind, or reads from others, than before."""
    if before is None or _form(before) != _form(now):
        yield "stages"
    if before is not None:
        for change in changed_keys(before.config, now.config):
            if change.matters and change.key != "stages" and now.sees(change.key):
                yield change.key


def _form(entry: NamedStage) -> object:
    return entry.stage.kind, {kind: source.name for kind, source in entry.sources.items()}


def stale_lines(stages: Sequence[NamedStage], run: RunFolder) -> Iterator[str]:
    """A warning for each finished stage that was given other artifacts than there are now. Raises StorageError."""
    made = read_lineage(run.path)
    by_path = {entry.path: entry for entry in made}
    names = [entry.name for entry in stages if entry.is_finished(run)]
    for artifact in made:
        reason = why_stale(artifact, by_path)
        if reason and artifact.stage in names:
            stage = artifact.stage
            yield f"WARNING {artifact.path} of stage {stage!r} is stale: {reason}. Make it again: --from {stage}"
