"""Runs the stages of one run in order, without those that an earlier attempt finished."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.groups.group import ActorGroup
from actors.watching.trackers import open_trackers
from jobs.contents import digest_of
from jobs.prepare import Prepared
from jobs.rerun import stale_lines
from jobs.stages.events import stage_events
from jobs.stages.stage import StageJob
from jobs.stages.table import NamedStage, stages_of, to_do
from orchestrator.config.config import Config
from orchestrator.errors import ConfigError
from orchestrator.roles import Trackers
from orchestrator.run.folder import RunFolder
from orchestrator.run.lineage import Made, config_digest, read_lineage, record, source_commit
from orchestrator.run.mirror import Mirror, Mirroring
from orchestrator.watching.exposition import PrometheusEndpoint
from orchestrator.watching.guards import why_paused
from orchestrator.watching.heartbeat import Heartbeat
from orchestrator.watching.telemetry import Telemetry

Say = Callable[[str], None]


class _Now:
    """The content of the heartbeat: the current stage and the groups that it waits for."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self.telemetry: Telemetry | None = None
        self.groups: Sequence[ActorGroup] = ()

    def __call__(self) -> Mapping[str, Any]:
        if self.telemetry is None:
            return {}
        waiting = [call for group in self.groups for call in group.waiting()]
        return {**self.telemetry.now(), "waiting": waiting, "paused": why_paused(self._run)}

    def watch(self, groups: Sequence[ActorGroup]) -> None:
        self.groups = groups


async def run_stages(config: Config, run: RunFolder, prepared: Prepared, say: Say, *, only: str | None = None) -> None:
    """Runs the unfinished stages of the config, or one stage, `only`. Raises a stage's errors."""
    stages = stages_of(config)
    now = _Now(run.path)
    async with _mirroring(config, run, say), Heartbeat(run.path, run.attempt, now):
        with ExitStack() as stack:
            chosen = [entry for entry in stages if entry.name == only] if only else list(to_do(stages, run))
            names = [entry.name for entry in (chosen if only else stages)]
            pipeline = _Pipeline(config, run, prepared, say, _open_endpoint(config, run, stack, say), now, names)
            for entry in stages:
                if entry in chosen:
                    await pipeline.run_stage(entry)
                elif entry.is_finished(run):
                    pipeline.note_lineage(entry)
            for line in stale_lines(stages, run):
                say(line)


@dataclass(frozen=True)
class _Pipeline:
    config: Config
    run: RunFolder
    prepared: Prepared
    say: Say
    endpoint: PrometheusEndpoint | None
    now: _Now
    names: Sequence[str]

    async def run_stage(self, entry: NamedStage) -> None:
        inputs = entry.inputs(self.run)
        folder = entry.of(self.run)
        folder.place.mkdir(parents=True, exist_ok=True)
        with self._telemetry(entry, folder) as telemetry:
            result = await entry.stage.run(
                StageJob(
                    name=entry.name,
                    config=entry.config_in(self.run),
                    run=folder,
                    makes=entry.stage.makes(entry.config),
                    prepared=self.prepared.of(entry.config),
                    telemetry=telemetry,
                    say=self.say,
                    inputs=inputs,
                    start_policy=entry.config.model.path,
                    watch=self.now.watch,
                )
            )
            self.now.watch(())
            self._record(entry, inputs, result)

    @contextmanager
    def _telemetry(self, entry: NamedStage, folder: RunFolder) -> Iterator[Telemetry]:
        """A stage's telemetry; records the stage's start and end, of whatever kind, as events."""
        config, run, logs = entry.config, self.run, entry.stage.has_log
        trackers = self._trackers(entry, folder) if logs else ()
        telemetry = Telemetry(
            run.path,
            run.id,
            run.attempt,
            trackers,
            self.say if entry.stage.shown else None,
            stage=entry.name,
            num_steps=entry.stage.num_steps(config),
            shown=entry.stage.shown,
            prometheus=self.endpoint,
            fence=run.require_newest,
        )
        self.now.telemetry = telemetry
        with telemetry, stage_events(telemetry, self.names, folder.checkpoints):
            yield telemetry

    def _trackers(self, entry: NamedStage, folder: RunFolder) -> Sequence[Trackers]:
        settings = entry.config.model_dump(mode="json")
        return open_trackers(entry.config.telemetry, folder.place, self.run.id, settings=settings, tell=self.say)

    def note_lineage(self, entry: NamedStage) -> None:
        """For a stage whose attempt was killed after it made its artifacts and before it recorded them."""
        known = {made.path for made in read_lineage(self.run.path)}
        paths = [entry.artifact(made.kind, self.run) for made in entry.stage.makes(entry.config)]
        if any(str(path.relative_to(self.run.path)) not in known for path in paths):
            self._record(entry, entry.inputs(self.run), {})

    def _record(self, entry: NamedStage, inputs: Mapping[str, Path], result: Mapping[str, Any]) -> None:
        """Writes the lineage of the stage's artifacts."""
        root = self.run.path
        read = {kind: str(path.relative_to(root)) for kind, path in inputs.items()}
        digests = {made.path: made.sha256 for made in read_lineage(root) if made.path in read.values()}
        contents = entry.config.run.contents
        for made in entry.stage.makes(entry.config):
            path = entry.artifact(made.kind, self.run)
            record(
                root,
                Made(
                    kind=made.kind,
                    path=str(path.relative_to(root)),
                    stage=entry.name,
                    attempt=self.run.attempt,
                    sha256=digest_of(path),
                    config_sha256=config_digest(entry.config),
                    commit=source_commit(),
                    reads=read,
                    read_sha256=digests,
                    contents={key: contents[key] for key in contents if key in entry.outside},
                    result=dict(result),
                ),
            )


def _mirroring(config: Config, run: RunFolder, say: Say) -> AbstractAsyncContextManager[object]:
    if config.run.mirror is None:
        return nullcontext()
    return Mirroring(
        Mirror(config.run.mirror, run.id),
        run.path,
        run.attempt,
        every_s=config.run.mirror_every_s,
        fence=run.require_newest,
        tell=say,
    )


def _open_endpoint(config: Config, run: RunFolder, stack: ExitStack, say: Say) -> PrometheusEndpoint | None:
    """The endpoint on its port, otherwise on a free one, otherwise none: a run starts without it."""
    telemetry = config.telemetry
    if telemetry.prometheus_port is None:
        return None
    for port in (telemetry.prometheus_port, 0):
        try:
            return stack.enter_context(
                PrometheusEndpoint(run.path, run.id, run.attempt, host=telemetry.prometheus_host, port=port)
            )
        except ConfigError as error:
            say(f"WARNING {error}")
    return None
