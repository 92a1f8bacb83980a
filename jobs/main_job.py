"""The work of `python -m jobs.ppo` once its input is known to be good: connect, run the stages, show the result."""

from __future__ import annotations

from actors.cluster import connect
from jobs.command import imported, run_async, say
from jobs.pipeline import run_stages
from jobs.prepare import Prepared
from jobs.run_folder import open_run
from orchestrator.config import Config


def run_job(config: Config, prepared: Prepared, ray_address: str | None) -> None:
    connect(ray_address, wait_s=config.placement.wait_s)
    run = open_run(config)
    say(f"run {run.id}, attempt {run.attempt}: {run.path}")
    for note in run.notes:
        say(note)
    run_async(run_stages(config, run, prepared, say))
    imported("jobs.results:show_results")(run.path)
