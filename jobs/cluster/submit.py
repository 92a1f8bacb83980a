"""`rlhf submit --address URL --config FILE [section.key=value ...]`: runs a job on a Ray cluster.

Sends the packages and the config, follows the job's output and ends with the job's exit code. If the cluster requires a
token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH. Ctrl-C stops the job and gives it time to save its state.
"""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from actors.groups.cluster import network_settings
from jobs.cluster.jobs_api import STOP_GRACE_S, Job, connect, follow, submit
from jobs.cluster.staging import stage_project
from jobs.command import err, out, run_async, run_command, say
from jobs.run import From, Only
from orchestrator.config.loader import load_config
from orchestrator.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SENT_CONFIG = "submitted.yaml"


def main(
    config: Annotated[Path, typer.Option("--config", help="YAML file; it is sent along.")],
    address: Annotated[str, typer.Option("--address", help="URL of the cluster's dashboard.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides such as rl.steps=10.")] = None,
    include: Annotated[list[Path] | None, typer.Option("--include", help="Further file or folder to send.")] = None,
    resource: Annotated[
        list[str] | None, typer.Option("--resource", help="NAME=AMOUNT that the coordinator's node must offer.")
    ] = None,
    begin: From = None,
    only: Only = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the job to its end.")] = True,
) -> None:
    """Runs a job on a Ray cluster. Exit code: the job's; 2: bad config or no such cluster."""
    code = 0

    def work() -> None:
        nonlocal code
        load_config(config, overrides or ())
        resources = dict(map(_parse_resource, resource or ()))
        client = connect(address)
        with tempfile.TemporaryDirectory(prefix="rlhf-") as folder:
            stage = Path(folder) / "project"
            stage.mkdir()
            stage_project(ROOT, stage, include or (), say)
            shutil.copy2(config, stage / SENT_CONFIG)
            command = run_of(overrides or (), begin=begin, only=only)
            job_id = submit(
                client, Job(f"exec {command}", working_dir=stage, resources=resources, environment=network_settings())
            )
        say(f"submitted {job_id} to {address}")
        if wait:

            async def watch() -> None:
                nonlocal code
                code = await follow(client, job_id, write_raw)

            run_async(watch(), grace_s=STOP_GRACE_S)

    run_command(work)
    if code:
        err.print(f"job failed with exit code {code}")
    raise typer.Exit(code)


def run_of(overrides: Sequence[str], *, begin: str | None, only: str | None) -> str:
    """The command of `rlhf run` with the sent config."""
    options = {"--from": begin, "--only": only}
    chosen = [word for name, value in options.items() if value is not None for word in (name, value)]
    return shlex.join(["python", "-m", "jobs", "run", "--config", SENT_CONFIG, *chosen, *overrides])


def write_raw(text: str) -> None:
    """Prints a job's output unchanged."""
    out.file.write(text)
    out.file.flush()


def _parse_resource(text: str) -> tuple[str, float]:
    name, separator, amount = text.partition("=")
    try:
        if not (name and separator):
            raise ValueError(text)
        return name, float(amount)
    except ValueError:
        raise ConfigError(f"--resource {text!r} does not have the form NAME=AMOUNT, e.g. coordinator=1.") from None


if __name__ == "__main__":
    typer.run(main)
