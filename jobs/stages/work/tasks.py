"""Measures a model on evaluate.tasks, on an actor with the resources of a reference."""

from __future__ import annotations

from collections.abc import Mapping
from time import monotonic

from actors.roles.tasks import TaskWorker
from jobs.stages.settings import start_s
from jobs.stages.stage import StageJob
from jobs.stages.work.wiring import all_ready, starting, supervisor_of
from orchestrator.config.config import Config
from orchestrator.errors import DeadlineExceeded
from orchestrator.planning.demands import reference_demand

WAIT_S = 5.0
SAID_S = 60.0


async def task_metrics(job: StageJob, config: Config, suffix: str) -> dict[str, float]:
    """The metrics of config.model.path, as TASK/METRIC and `suffix`. Empty without tasks.

    Raises:
        DataError: lm-eval failed.
        RoleError: the actor failed too often; it also counts as failed if deadlines.score_s pass without a batch.
    """
    tasks = config.evaluate.tasks
    if not tasks:
        return {}
    async with starting(config, [reference_demand(config)]) as starter:
        job.watch(starter.groups)
        arguments = {
            "model": config.model,
            "cache": config.run.cache,
            "micro_batch_tokens": config.reference.micro_batch_tokens,
        }
        ranks = await starter.ranks("reference", TaskWorker, arguments)
        deadline_s = start_s(config)
        await all_ready({"reference": ranks}, deadline_s)
        supervisor = supervisor_of(config, starter, job.telemetry, job.run, deadline_s)
        patience_s = config.deadlines.score_s

        async def measure() -> Mapping[str, float]:
            await ranks.call(0, TaskWorker.start, deadline_s, tasks)
            num_batches, since, said = 0, monotonic(), monotonic()
            while True:
                seen, found = await ranks.call(0, TaskWorker.wait, WAIT_S + patience_s, WAIT_S)
                if found is not None:
                    return found
                now = monotonic()
                if seen > num_batches:
                    num_batches, since = seen, now
                if now - since > patience_s:
                    raise DeadlineExceeded("reference", 0, "evaluate.tasks", f"no batch within {patience_s:g} s")
                if now - said > SAID_S:
                    said = now
                    job.say(f"{job.name}: {num_batches} batches of {', '.join(tasks)}")

        found = await supervisor.keep(ranks, measure)
    return {f"{name}{suffix}": value for name, value in found.items()}
