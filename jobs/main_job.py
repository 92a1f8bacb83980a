"""The work of `rlhf run` after its checks: connect, run the stages, show the result."""

from __future__ import annotations

from functools import partial

from actors.machine.node_speeds import slower_nodes
from jobs.cluster.connection import cluster
from jobs.command import imported, run_async, say
from jobs.grace import saving_s, warning
from jobs.pipeline import run_stages
from jobs.prepare import Prepared
from jobs.rerun import Rerun
from jobs.resolve import uses_gpus
from orchestrator.config.config import Config
from orchestrator.run.folder import open_run


def run_job(config: Config, prepared: Prepared, ray_address: str | None, rerun: Rerun | None = None) -> None:
    with cluster(ray_address, wait_s=config.placement.wait_s, tell=say):
        if not uses_gpus(config):
            for line in slower_nodes(config.model.compute_dtype, config.run.cache):
                say(line)
        if rerun is None:
            run = open_run(config, say)
        else:
            run = open_run(config, say, compare=rerun.compare, prepare=partial(rerun.set_aside, say))
        say(f"run {run.id}, attempt {run.attempt}: {run.path}")
        for note in filter(None, [*run.notes, warning(config.run)]):
            say(note)
        run_async(
            run_stages(config, run, prepared, say, only=rerun.only if rerun else None), grace_s=saving_s(config.run)
        )
    imported("jobs.report.results:show_results")(run.path)
