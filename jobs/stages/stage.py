"""A stage of a run as an object: what it reads and makes, what it needs, how it is checked, and its work.

Modules of stages import nothing heavy: `run` imports the code that needs Ray and torch (ADR 11). The defaults of
`Stage` are those of a stage that needs nothing, so that a new stage defines only its differences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from jobs.command import imported
from orchestrator.config.changes import value_of
from orchestrator.config.config import Config
from orchestrator.config.sections import LoraConfig
from orchestrator.planning.disk import Disk, rows_disk
from orchestrator.planning.memory import ModelSize
from orchestrator.planning.placement import Node, Plan
from orchestrator.prompts import HELD_OUT_FRACTION
from orchestrator.run.folder import RunFolder
from orchestrator.types import Prompt
from orchestrator.watching.telemetry import Shown, Telemetry

if TYPE_CHECKING:  # heavy
    import pyarrow as pa

    from actors.groups.group import ActorGroup
    from actors.text.conversations import Chat
    from jobs.prepare import Prepared

POLICY = "policy"
"""The kind of artifact that is a policy: a folder as Hugging Face has it."""

Say = Callable[[str], None]
Row = tuple[str, str]


@dataclass(frozen=True)
class Artifact:
    """A file or folder that a stage makes. `path` is relative to the stage's folder; `kind` is what readers ask for.

    `holds`: what is in it, where artifacts of one kind differ.
    """

    kind: str
    path: str
    holds: str = ""


@dataclass(frozen=True)
class Inputs:
    """A stage's inputs from outside, by key of the config; a run's identity includes their contents. None: not set."""

    files: Mapping[str, Path | None] = field(default_factory=dict)
    models: Mapping[str, str | None] = field(default_factory=dict)
    rules: frozenset[str] = frozenset()


@dataclass(frozen=True)
class ModelUse:
    """A stage's use of one model.

    Args:
        key: of the config; names the model in errors.
        scores: with a scalar head, which is created if there is none.
        window: number of positions that it must support, as `window_key` says. None: longer input is cut.
        layers: number of layers that are kept, from the first on. None: all.
        heads: number of scalar heads that are trained. None: those that it has.
    """

    key: str
    model: str
    scores: bool
    window: int | None
    window_key: str = "model.max_length"
    checkpointing: bool = False
    exports: bool = False
    layers: int | None = None
    heads: int | None = None
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(frozen=True)
class Found:
    """What the checks of a stage can use, besides the config. None: it is bad, which is reported already, or the run
    has no prompts. `examples` is an invented reply to a few prompts, in the form in which reward sources get
    samples."""

    chat: Chat | None
    prepared: Prepared | None
    examples: pa.Table | None


@dataclass(frozen=True)
class RowSizes:
    """The data of a training without rollouts, for estimates.

    Args:
        num_records: records, each of one row or several.
        lengths: tokens of every row.
        learned: share of these tokens that is learned.
    """

    num_records: int
    lengths: npt.NDArray[np.int64]
    learned: float


def row_sizes(measured: Sequence[tuple[int, int]], *, num_rows: int, num_records: int) -> RowSizes:
    """Args: measured: (tokens, learned tokens) of some rows, which stand for all."""
    lengths = np.asarray([total for total, _ in measured], dtype=np.int64)
    learned = sum(learned for _, learned in measured) / max(int(lengths.sum()), 1)
    return RowSizes(num_records, np.resize(lengths, num_rows), learned)


class Sizes(Protocol):
    """Sizes of models."""

    def of(self, name: str, layers: int | None = None) -> ModelSize:
        """`layers`: the number of layers that are kept. None: all."""


class Costs(Protocol):
    """Seconds of work on this machine, in the units that stages are made of (jobs/plan/estimate.py)."""

    @property
    def config(self) -> Config: ...

    def sampling(self, prompts: Sequence[Prompt], replies_per_prompt: int) -> float: ...

    def reward_model(self, prompts: Sequence[Prompt]) -> float: ...

    def sft(self, rows: RowSizes) -> float: ...

    def preference(self, rows: RowSizes) -> float: ...

    def rl(self, train: Sequence[Prompt], held_out: Sequence[Prompt]) -> float: ...


@dataclass(frozen=True, kw_only=True)
class StageJob:
    """The arguments of a stage's work.

    Args:
        name: of the stage in this run, for lines on the console.
        config: the run's, with the stage's own settings.
        run: the run's folder, with the paths of this stage.
        inputs: artifacts that it reads, by kind.
        start_policy: the model that the run starts from.
        watch: gets the groups of actors that it waits for, for the heartbeat.
    """

    name: str
    config: Config
    run: RunFolder
    makes: Sequence[Artifact]
    prepared: Prepared
    telemetry: Telemetry
    say: Say
    inputs: Mapping[str, Path]
    start_policy: str
    watch: Callable[[Sequence[ActorGroup]], None]

    def output(self, kind: str) -> Path:
        """The path of the artifact of this kind."""
        return next(self.run.place / made.path for made in self.makes if made.kind == kind)


class Stage:
    """One kind of stage.

    Attributes:
        kind: its name in `stages` of a config.
        start_s: seconds until its processes are ready, and those that end it, for estimates.
        samples: whether it starts rollout engines on the run's prompts.
        uses: kinds of artifacts that it reads if an earlier stage makes them, whatever the config.
        starts_from_policy: whether it starts from the policy: that of the last stage before it which makes one, or
            model.path.
        sections: sections of the config that affect its results and not those of stages which don't name them. Sections
            that no stage names affect all stages. Empty: it is affected by all.
        leaves: files and folders that it writes besides its artifacts.
        has_log: whether it learns in steps from an experience log: it has checkpoints, evaluations, trackers, a report.
        steps_key: dotted key of the config that holds the number of its steps.
        shown: metrics in the lines on the console about its steps.
        checks: `module:function` of (config, Found), which returns a line for the console or None, or raises an error.
        instead: by kind of artifact that it reads, what the user can give instead, for errors.
    """

    kind: str = ""
    start_s: float = 10.0
    samples: bool = False
    uses: Sequence[str] = ()
    starts_from_policy: bool = False
    sections: Sequence[str] = ()
    leaves: Sequence[str] = ()
    has_log: bool = False
    steps_key: str = ""
    shown: Sequence[Shown] = ()
    checks: Sequence[str] = ()
    instead: Mapping[str, str] = MappingProxyType({})

    def reads(self, config: Config) -> Sequence[str]:
        """Kinds of artifacts that earlier stages must make."""
        return ()

    def may_read(self, config: Config) -> Sequence[str]:
        """Kinds of artifacts that it reads if an earlier stage makes them."""
        return self.uses

    def makes(self, config: Config) -> Sequence[Artifact]:
        return ()

    def num_steps(self, config: Config) -> int | None:
        """Number of steps, for its progress. None: it reports no steps."""
        return value_of(config, self.steps_key) if self.steps_key else None

    def problems(self, config: Config) -> Iterable[str]:
        """Keys that contradict each other in a run with this stage."""
        return ()

    def misfits(self, config: Config, read: Mapping[str, Artifact]) -> Iterable[str]:
        """Problems of the artifacts that it reads, by kind."""
        return ()

    def inputs(self, config: Config) -> Inputs:
        return Inputs()

    def models(self, config: Config) -> Iterable[ModelUse]:
        return ()

    def plan(self, config: Config, nodes: Sequence[Node]) -> Plan:
        """The placement of its actors; stages take turns. Raises CapacityError: they do not fit."""
        return Plan(())

    def disk(self, config: Config, sizes: Sizes) -> Disk:
        """What it writes at most."""
        return Disk()

    def rows(self, config: Config, prepared: Prepared) -> RowSizes | None:
        """The data of a training without rollouts. None: it is none."""
        return None

    def rows_disk(self, config: Config, prepared: Prepared) -> Disk:
        """What the data of a training takes while it is read; a tenth more stands for the part that is held out."""
        rows, share = self.rows(config, prepared), 1.0 + HELD_OUT_FRACTION
        return Disk() if rows is None else rows_disk(share * float(rows.lengths.sum()), share * len(rows.lengths))

    def arithmetic(self, config: Config, prepared: Prepared) -> Sequence[Row]:
        """The sizes of its batches and the like, as (name, value)."""
        return ()

    def seconds(self, costs: Costs, prepared: Prepared) -> float:
        """Seconds of its work on this machine, without its start."""
        return 0.0

    def is_finished(self, config: Config, run: RunFolder) -> bool:
        """Whether it is complete."""
        return all((run.place / made.path).exists() for made in self.makes(config))

    async def run(self, job: StageJob) -> Mapping[str, Any]:
        """Does the work, continuing where an earlier attempt stopped. Returns a description of the result, for
        lineage. The work itself is in the module of this kind in jobs/stages/work."""
        done: Mapping[str, Any] = await imported(f"jobs.stages.work.{self.kind}:run")(job)
        return done
