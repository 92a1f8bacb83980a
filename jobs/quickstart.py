"""`make quickstart`: the main job on a private Ray on this machine.

Starts Ray (loopback only, private token), submits `rlhf run` through Ray's Jobs API, prints its output, and stops what
it started. Exit code: the job's. Models come from folders; with HF_HUB_OFFLINE=0 also from the Hugging Face hub.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Annotated

import typer

from jobs.cluster.jobs_api import FAILED, STOP_GRACE_S, Job, connect_local, follow, submit
from jobs.cluster.local_ray import LocalRay, local_ray
from jobs.cluster.submit import write_raw
from jobs.command import imported, run_async, run_command, say
from orchestrator.config.config import Config
from orchestrator.config.loader import load_config
from orchestrator.errors import RlhfError
from orchestrator.run.folder import kept_config

CONFIG = Path("jobs/configs/quickstart.yaml")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}


def main(
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides such as rl.steps=2.")] = None,
    config: Annotated[Path, typer.Option("--config", help="YAML file.")] = CONFIG,
) -> None:
    """Runs a job from nothing to its result on this machine. Exit code: the job's."""
    code = 0

    def work() -> None:
        nonlocal code
        keys = [*(overrides or ())]
        settings = load_config(config, keys)
        # The job runs in the folder in which this command was called, so relative paths keep their meaning.
        entrypoint = shlex.join([sys.executable, "-m", "jobs", "run", "--config", str(config), *keys])
        entrypoint = f"cd {shlex.quote(str(Path.cwd()))} && exec {entrypoint}"
        set_environment()
        _announce(settings)
        code = run_on_local_ray(entrypoint, settings)

    run_command(work)
    raise typer.Exit(code)


def set_environment() -> None:
    """Sets what is not set."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _announce(config: Config) -> None:
    """Prints how long a new run will take. Ignores errors in its input, which the job reports."""
    with suppress(RlhfError):
        if kept_config(config) is None and not imported("jobs.resolve:uses_gpus")(config):
            say(imported("jobs.plan.estimate:expected")(config))


def run_on_local_ray(entrypoint: str, config: Config) -> int:
    """Runs a shell command as a job on a private local Ray; returns its exit code."""
    started = monotonic()
    say("starting Ray on this machine ...")
    with local_ray() as ray:
        say(f"Ray is up after {monotonic() - started:.0f} s; dashboard {ray.url} (token in {ray.token_file})")
        client = connect_local(ray)
        job_id = submit(client, Job(entrypoint))
        say(f"submitted {job_id} through Ray's Jobs API")
        code = FAILED

        async def watch() -> None:
            nonlocal code
            code = await follow(client, job_id, write_raw)

        run_async(watch(), grace_s=STOP_GRACE_S)
        if code == FAILED:
            keep_logs(ray, config.run.root / "ray-logs" / job_id)
    say(f"Ray stopped; {monotonic() - started:.0f} s in all, exit code {code}")
    return code


def keep_logs(ray: LocalRay, folder: Path) -> None:
    """Copies the logs of Ray's processes to a new `folder` that only this user can enter. Ray's own folder is 0777."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700)
    shutil.copytree(ray.logs, folder / "logs", ignore_dangling_symlinks=True)
    say(f"logs of Ray's processes: {folder / 'logs'}")


if __name__ == "__main__":
    typer.run(main)
