"""Learns again from a run's log.

Starts the learners as the run did and folds learning over the committed steps, without engine, reference or
reward. On the same kind of machine, with the same ranks and threads, it ends with the same bits as the run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.cluster.connection import cluster
from jobs.command import run_async, say
from jobs.resolve import WITHOUT_TRIAL, resolved
from jobs.stages.events import stage_events
from jobs.stages.settings import critic_warmup_steps, initial_state, reward_path, start_s
from jobs.stages.table import logged_stage
from jobs.stages.work.wiring import (
    all_ready,
    experience_log,
    learners_of,
    recorder_of,
    start_learners,
    start_recorders,
    starting,
)
from orchestrator.config.changes import changed_keys
from orchestrator.config.config import Config
from orchestrator.config.loader import load_kept_config
from orchestrator.coordinator import Relearning
from orchestrator.data.inputs import at_home
from orchestrator.errors import ConfigError
from orchestrator.failures import LEARNERS
from orchestrator.planning.demands import all_demands
from orchestrator.run.attempts import ATTEMPTS, claim
from orchestrator.run.checkpoints import Checkpoints, complete_checkpoints
from orchestrator.run.experience_log import num_committed
from orchestrator.run.folder import CONFIG_FILE, RunFolder
from orchestrator.run.storage import read_json, writing
from orchestrator.types import State
from orchestrator.watching.guards import Guards, guard_table, only_warning
from orchestrator.watching.heartbeat import Heartbeat
from orchestrator.watching.telemetry import Telemetry

NEEDED = (*LEARNERS, "recorder")
STAGE = "replay"


def replay(path: Path, until: int | None, to: Path | None, ray_address: str | None, *, from_checkpoint: bool) -> None:
    """Learns steps 0 to `until` - 1 (None: all logged steps) again into the folder `to` (None: `path`/replay).

    Raises ConfigError: no such run, or the log lacks the steps.
    """
    config, opened = read_run_folder(path)
    stage = logged_stage(config)
    if stage is None:
        raise ConfigError(f"run {path.name} has no stage that learns from a log, so there is nothing to learn again.")
    config, run = stage.config_in(opened), stage.of(opened)
    last_step = steps_to_learn(run, until, from_checkpoint=from_checkpoint)
    folder = (to or run.place / "replay").absolute()
    if folder == opened.path:
        raise ConfigError(f"--to {to} is the run's own folder, whose results it would replace; name another.")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ATTEMPTS).mkdir(exist_ok=True)
    attempt = claim(folder, wait_s=config.placement.wait_s, tell=say)
    work = _Replay(config, run, folder, attempt, last_step, from_checkpoint, reward_path(config, stage.inputs(opened)))
    with cluster(ray_address, wait_s=config.placement.wait_s, tell=say):
        run_async(work.run(), grace_s=config.run.grace_s)


def read_run_folder(path: Path) -> tuple[Config, RunFolder]:
    """A run's config and its folder, opened without a new attempt. Raises ConfigError when `path` holds no run."""
    path = at_home(path, "RUN_FOLDER", ConfigError).absolute()
    if not (path / CONFIG_FILE).is_file():
        raise ConfigError(f"{path} holds no {CONFIG_FILE}, so it is no run folder; give the one that a run printed.")
    kept = load_kept_config(path / CONFIG_FILE)
    config = resolved(kept, keys=WITHOUT_TRIAL)
    changed = [change for change in changed_keys(kept, config) if change.matters and change.is_model]
    if changed:
        raise ConfigError(
            f"learning again would start from other weights than run {path.name} did: "
            + "; ".join(map(str, changed))
            + ". Put back the files that it started with, or set run.accept_changed_files: true in "
            + f"{path / CONFIG_FILE}."
        )
    return config, RunFolder(path, path.name, attempt=0)


def steps_to_learn(run: RunFolder, until: int | None, *, from_checkpoint: bool) -> int:
    """The step to end before. Raises ConfigError when log and checkpoint do not lead there."""
    held = num_committed(run.log)
    last_step = held if until is None else until
    if not 0 < last_step <= held:
        wanted = f"--until {until} must lie between 1 and {held}" if held else "there is nothing to replay"
        raise ConfigError(f"the log {run.log} holds {held} committed steps; {wanted}.")
    if from_checkpoint:
        complete = complete_checkpoints(run.checkpoints)
        if not complete or complete[-1] > checkpoint_of(run.checkpoints, last_step):
            newest = f"the newest is {complete[-1].name}" if complete else "there is none"
            raise ConfigError(
                f"--from-checkpoint needs a checkpoint of step {last_step} or before in {run.checkpoints}, {newest}. "
                "Leave --from-checkpoint out to learn from step 0."
            )
    return last_step


def checkpoint_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:06d}"


@dataclass(frozen=True)
class _Replay:
    """One replay, which records its heartbeat and its end as a run does."""

    config: Config
    run_folder: RunFolder
    folder: Path
    attempt: int
    last_step: int
    from_checkpoint: bool
    reward_path: str | None = None

    async def run(self) -> None:
        checkpoints = self.folder / "checkpoints"
        with Telemetry(
            self.folder, self.run_folder.id, self.attempt, console=say, stage=STAGE, num_steps=self.last_step
        ) as telemetry:
            async with Heartbeat(self.folder, self.attempt, telemetry.now):
                with stage_events(telemetry, [STAGE], checkpoints):
                    state, roles = await self._learn(telemetry, checkpoints)
        _tell(self.run_folder, self.folder, state, roles)

    async def _learn(self, telemetry: Telemetry, checkpoints: Path) -> tuple[State, Sequence[str]]:
        """The state after the last step, and the roles that learned."""
        config, run, last_step = self.config, self.run_folder, self.last_step
        needed = [demand for demand in all_demands(config) if demand.role in NEEDED]
        async with starting(config, needed) as starter:
            groups = await start_learners(config, starter, self.reward_path)
            recorders = await start_recorders(config, starter, run)
            await all_ready({**groups, "recorder": recorders}, start_s(config))
            learners = learners_of(config, groups)
            saved = Checkpoints(run.checkpoints, learners.by_role, every_steps=0, last_step=last_step, keep=1)
            result = Checkpoints(checkpoints, learners.by_role, every_steps=0, last_step=last_step, keep=1)
            log = experience_log(config, run, recorder_of(config, recorders))
            table = only_warning(guard_table(config.guards))
            relearning = Relearning(
                steps=last_step,
                critic_warmup_steps=critic_warmup_steps(config),
                next_kl_coefficient=config.algorithm.next_kl_coefficient,
                roles=learners,
                log=log,
                guards=Guards(table, folder=self.folder, telemetry=telemetry, past=log.metrics, console=say),
                telemetry=telemetry,
            )
            start = await saved.restore() if self.from_checkpoint else None
            state = start or initial_state(config)
            telemetry.rewind(state.step)
            state = await relearning.relearn(state)
            await result.save(state)
            export = self.folder / "export"
            export.mkdir(exist_ok=True)
            await learners.policy.export(export)
        return state, tuple(learners.by_role)


def _tell(run: RunFolder, folder: Path, state: State, roles: Sequence[str]) -> None:
    learned = checkpoint_of(folder / "checkpoints", state.step)
    original = checkpoint_of(run.checkpoints, state.step)
    say(f"learned steps 0 to {state.step - 1} of run {run.id} again")
    for role in roles:
        found = fingerprint(learned, role)
        line = f"{role} sha256 {found}"
        if (original / "manifest.json").exists():
            is_same = fingerprint(original, role) == found
            line += f"  {'equal to' if is_same else 'DIFFERENT from'} the run's own {original.name}"
        say(line)
    say(f"checkpoint: {learned}")
    say(f"policy: {folder / 'export'}")


def fingerprint(checkpoint: Path, role: str) -> str:
    """SHA-256 over all files of one role in a checkpoint: weights, fp32 masters, optimizer and schedule."""
    manifest = read_json(checkpoint / "manifest.json")
    entries = [f"{name} {entry['sha256']}\n" for name, entry in sorted(manifest.items()) if name.startswith(f"{role}/")]
    return hashlib.sha256("".join(entries).encode()).hexdigest()
