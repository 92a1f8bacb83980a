"""The work of stage `rl`: starts all roles, runs the coordinator, exports the policy."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

from actors.groups.starter import Starter
from jobs.stages.settings import initial_state, reward_path
from jobs.stages.stage import StageJob
from jobs.stages.work.wiring import coordinating
from orchestrator.coordinator import Coordinator
from orchestrator.errors import StorageError
from orchestrator.run.storage import writing


async def run(job: StageJob) -> Mapping[str, Any]:
    """Raises the error of a role after which the supervisor gives up."""

    def on_placed(starter: Starter) -> None:
        job.watch(starter.groups)
        plan = starter.plan.describe()
        job.telemetry.event("placed", plan=plan.splitlines())
        job.say("placement:\n  " + plan.replace("\n", "\n  "))

    async with coordinating(
        job.config, job.run, job.prepared.prompts, reward_path(job.config, job.inputs), job.telemetry, on_placed
    ) as coordinator:
        job.say(f"{job.name}: all roles are ready")
        state = await coordinator.run(initial_state(job.config))
        if job.config.checkpoints.export:
            job.run.export.mkdir(exist_ok=True)
            await coordinator.roles.policy.export(job.run.export)
            await _export_best(coordinator, job)
    return {"steps": state.step}


async def _export_best(coordinator: Coordinator, job: StageJob) -> None:
    """Exports the policy of the best checkpoint, unless that is the last one. Its weights replace those of the
    policy."""
    folder = job.run.best_export
    shutil.rmtree(folder, ignore_errors=True)
    try:
        best = await coordinator.checkpoints.load_best()
    except StorageError as error:
        job.say(f"WARNING the best checkpoint is not exported: {error}")
        return
    if best is not None:
        with writing(folder):
            folder.mkdir()
        await coordinator.roles.policy.export(folder)
        job.say(f"best by evaluation: {best}; exported to {folder}")
