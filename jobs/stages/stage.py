"""A stage of a run as an object: what it reads and makes, what it needs, how it is checked, and its work.

Modules of stages import nothing heavy: what runs, with Ray and torch behind it, is imported by `run` (ADR 11). The
defaults of `Stage` are those of a stage that needs nothing, so that a new one writes only what is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from orchestrator.config.changes import value_of
from orchestrator.config.config import Config
from orchestrator.planning.placement import Node, Plan
from orchestrator.run.folder import RunFolder
from orchestrator.watching.telemetry import Shown, Telemetry

if TYPE_CHECKING:  # heavy
    import pyarrow as pa

    from actors.groups.group import ActorGroup
    from actors.text.conversations import Chat
    from jobs.plan.estimate import Costs
    from jobs.prepare import Prepared

Say = Callable[[str], None]
Row = tuple[str, str]


@dataclass(frozen=True)
class Artifact:
    """A file or folder that a stage makes. `path` is relative to the stage's folder; `kind` is what readers ask for."""

    kind: str
    path: str


@dataclass(frozen=True)
class Inputs:
    """What a stage reads from outside, by key of the config; a run's identity includes its content. None: not set."""

    files: Mapping[str, Path | None] = field(default_factory=dict)
    models: Mapping[str, str | None] = field(default_factory=dict)
    rules: frozenset[str] = frozenset()


@dataclass(frozen=True)
class ModelUse:
    """What a stage wants of one model.

    Args:
        key: of the config; names the model in errors.
        scores: with a scalar head, which is made where there is none.
        window: positions that it must take. None: longer input is cut.
        layers: that are kept, from the first on. None: all.
    """

    key: str
    model: str
    scores: bool
    window: int | None
    checkpointing: bool = False
    exports: bool = False
    layers: int | None = None


@dataclass(frozen=True)
class Found:
    """What the checks of a stage may look at, besides the config. None: it is bad, which is told already, or the run
    has no prompts. `examples` is a made-up reply to a few prompts, as reward sources read samples."""

    chat: Chat | None
    prepared: Prepared | None
    examples: pa.Table | None


@dataclass(frozen=True, kw_only=True)
class StageJob:
    """What the work of a stage is handed.

    Args:
        name: of the stage in this run, for lines to people.
        config: the run's, with what the stage sets differently.
        run: the run's folder, whose paths are those of this stage.
        inputs: artifacts that it reads, by kind.
        watch: told the groups of actors that it waits for, for the heartbeat.
    """

    name: str
    config: Config
    run: RunFolder
    makes: Sequence[Artifact]
    prepared: Prepared
    telemetry: Telemetry
    say: Say
    inputs: Mapping[str, Path]
    watch: Callable[[Sequence[ActorGroup]], None]

    def output(self, kind: str) -> Path:
        """Where the artifact of this kind goes."""
        return next(self.run.place / made.path for made in self.makes if made.kind == kind)


class Stage:
    """One kind of stage.

    Attributes:
        kind: its name in `stages` of a config.
        start_s: seconds until its processes are ready, and those that end it, for estimates.
        samples: whether it starts rollout engines on the run's prompts.
        has_log: whether it learns in steps from an experience log: it has checkpoints, evaluations, trackers, a report.
        steps_key: dotted key of the config that holds the number of its steps.
        shown: metrics in the lines for people about its steps.
        checks: `module:function` of (config, Found), which returns a line for people or None and raises what is wrong.
        instead: by kind of artifact that it reads, what the user may give in its place, for errors.
    """

    kind: str = ""
    start_s: float = 10.0
    samples: bool = False
    has_log: bool = False
    steps_key: str = ""
    shown: Sequence[Shown] = ()
    checks: Sequence[str] = ()
    instead: Mapping[str, str] = MappingProxyType({})

    def reads(self, config: Config) -> Sequence[str]:
        """Kinds of artifacts that stages before it must make."""
        return ()

    def makes(self, config: Config) -> Sequence[Artifact]:
        return ()

    def num_steps(self, config: Config) -> int | None:
        """Steps that its progress is counted in. None: it tells none."""
        return value_of(config, self.steps_key) if self.steps_key else None

    def problems(self, config: Config) -> Iterable[str]:
        """Keys that contradict each other in a run with this stage."""
        return ()

    def inputs(self, config: Config) -> Inputs:
        return Inputs()

    def models(self, config: Config) -> Iterable[ModelUse]:
        return ()

    def plan(self, config: Config, nodes: Sequence[Node]) -> Plan:
        """Where its actors go; stages take turns. Raises CapacityError: they do not fit."""
        return Plan(())

    def arithmetic(self, config: Config, prepared: Prepared) -> Sequence[Row]:
        """The sizes of its batches and the like, as (name, value)."""
        return ()

    def seconds(self, costs: Costs, prepared: Prepared) -> float:
        """Its work on this machine, without its start."""
        return 0.0

    def is_finished(self, config: Config, run: RunFolder) -> bool:
        """Whether nothing of it is left to do."""
        return all((run.place / made.path).exists() for made in self.makes(config))

    async def run(self, job: StageJob) -> Mapping[str, Any]:
        """Does the work, on from where an earlier attempt stopped. Returns what there is to say of it, for lineage."""
        raise NotImplementedError
