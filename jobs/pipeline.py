"""Runs the stages of one run, in order; a stage that an earlier attempt finished is not run again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from actors.groups.group import ActorGroup
from actors.groups.starter import Starter
from actors.watching.trackers import open_trackers
from jobs.prepare import Prepared, find_data
from jobs.stages.events import stage_events
from jobs.stages.labeller import read_gold
from jobs.stages.preferences import make_preferences
from jobs.stages.reward_model import RESULT_FILE, split_held_out, train_reward_model
from jobs.stages.settings import initial_state, reward_model_of
from jobs.stages.wiring import ppo_coordinator
from orchestrator.config.config import Config, Stage
from orchestrator.coordinator import Coordinator
from orchestrator.data.readers import read_rankings
from orchestrator.errors import ConfigError, StorageError
from orchestrator.run.folder import RunFolder
from orchestrator.run.mirror import Mirror, Mirroring
from orchestrator.run.storage import write_json, writing
from orchestrator.watching.exposition import PrometheusEndpoint
from orchestrator.watching.guards import why_paused
from orchestrator.watching.heartbeat import Heartbeat
from orchestrator.watching.telemetry import Telemetry

Say = Callable[[str], None]


class _Now:
    """What the heartbeat tells: the stage under way and the groups that it waits for."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self.telemetry: Telemetry | None = None
        self.groups: Sequence[ActorGroup] = ()

    def __call__(self) -> Mapping[str, Any]:
        if self.telemetry is None:
            return {}
        waiting = [call for group in self.groups for call in group.waiting()]
        return {**self.telemetry.now(), "waiting": waiting, "paused": why_paused(self._run)}


async def run_stages(config: Config, run: RunFolder, prepared: Prepared, say: Say) -> None:
    """Runs what the config's `stages` names. Raises what a stage raises."""
    now = _Now(run.path)
    async with _mirroring(config, run, say), Heartbeat(run.path, run.attempt, now):
        with ExitStack() as stack:
            await _run_stages(config, run, prepared, say, _open_endpoint(config, run, stack, say), now)


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


async def _run_stages(
    config: Config, run: RunFolder, prepared: Prepared, say: Say, endpoint: PrometheusEndpoint | None, now: _Now
) -> None:
    stage = partial(_stage, config=config, run=run, endpoint=endpoint, say=say, now=now)
    if "preferences" in config.stages and not run.preferences.exists():
        with stage("preferences") as telemetry:
            await _preferences(config, run, prepared, telemetry, say)
    if "reward_model" in config.stages and not (run.path / RESULT_FILE).exists():
        with stage("reward_model") as telemetry:
            await _reward_model(config, run, telemetry, say)
    if "ppo" in config.stages:
        with stage("ppo") as telemetry:
            await _ppo(config, run, prepared, telemetry, say, now)


async def _preferences(config: Config, run: RunFolder, prepared: Prepared, telemetry: Telemetry, say: Say) -> None:
    report = await make_preferences(config, run, prepared.prompts.reward_model, telemetry, say)
    telemetry.event("labelled", **asdict(report))
    say(
        f"preferences: {report.num_rankings} prompts ranked; noisy labels agree with gold on "
        f"{report.pair_agreement:.1%} of pairs"
    )


async def _reward_model(config: Config, run: RunFolder, telemetry: Telemetry, say: Say) -> None:
    path = find_data(config.preferences.path) if config.preferences.path else run.preferences
    records, report = read_rankings(path, config.preferences.format, config.preferences.limit)
    say(f"reward model: {report.summary()}")
    train, held_out = split_held_out(records, config.preferences.held_out)
    gold = None
    if config.preferences.path is None:
        gold_of_prompt = read_gold(run.preferences)
        gold = [gold_of_prompt[record.id] for record in held_out]
    result = await train_reward_model(config, train, held_out, run.reward_model, telemetry, say, gold=gold)
    write_json(run.path / RESULT_FILE, asdict(result))
    telemetry.event("trained", **asdict(result))
    say(f"reward model: {result.describe()}")


async def _ppo(config: Config, run: RunFolder, prepared: Prepared, telemetry: Telemetry, say: Say, now: _Now) -> None:
    def on_placed(starter: Starter) -> None:
        now.groups = starter.groups
        plan = starter.plan
        telemetry.event("placed", plan=plan.describe().splitlines())
        say("placement:\n  " + plan.describe().replace("\n", "\n  "))

    async with ppo_coordinator(
        config, run, prepared.prompts, reward_model_of(config, run), telemetry, on_placed
    ) as coordinator:
        say("ppo: all roles are ready")
        await coordinator.run(initial_state(config))
        if config.checkpoints.export:
            run.export.mkdir(exist_ok=True)
            await coordinator.policy.export(run.export)
            await _export_best(coordinator, run, say)


async def _export_best(coordinator: Coordinator, run: RunFolder, say: Say) -> None:
    """The policy of the best checkpoint, where that is not the last one. Its weights replace those of the policy."""
    shutil.rmtree(run.best_export, ignore_errors=True)
    try:
        best = await coordinator.checkpoints.load_best()
    except StorageError as error:
        say(f"WARNING the best checkpoint is not exported: {error}")
        return
    if best is not None:
        with writing(run.best_export):
            run.best_export.mkdir()
        await coordinator.policy.export(run.best_export)
        say(f"best by evaluation: {best}; exported to {run.best_export}")


def _open_endpoint(config: Config, run: RunFolder, stack: ExitStack, say: Say) -> PrometheusEndpoint | None:
    """The endpoint on its port, else on a free one, else none: nobody scrapes a run that does not start."""
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


@contextmanager
def _stage(
    name: Stage, *, config: Config, run: RunFolder, endpoint: PrometheusEndpoint | None, say: Say, now: _Now
) -> Iterator[Telemetry]:
    """A stage's telemetry; its start and its end, of whatever kind, are events."""
    is_ppo = name == "ppo"
    settings = config.model_dump(mode="json")
    trackers = open_trackers(config.telemetry, run.path, run.id, settings=settings, tell=say) if is_ppo else ()
    num_steps = config.rl.steps if is_ppo else None
    telemetry = Telemetry(
        run.path,
        run.id,
        run.attempt,
        trackers,
        say if is_ppo else None,
        stage=name,
        num_steps=num_steps,
        prometheus=endpoint,
        fence=run.require_newest,
    )
    now.telemetry = telemetry
    with telemetry, stage_events(telemetry, config.stages, run.checkpoints):
        yield telemetry
