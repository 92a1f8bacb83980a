"""`python -m jobs.ppo --config FILE [section.key=value ...]`: the main job, with the stages that the config names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from actors.cluster import connect
from jobs.command import read_config, run_async, run_command, say
from jobs.pipeline import run_stages
from jobs.prepare import prepare
from jobs.results import show_results
from jobs.run_folder import open_run
from orchestrator.config import Config

ConfigOption = Annotated[Path | None, typer.Option("--config", help="YAML file; without it all defaults.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides such as ppo.steps=10.")]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Print the resolved config and exit.")]
Address = Annotated[str | None, typer.Option("--ray-address", help="Ray cluster; default: RAY_ADDRESS, else local.")]


def main(
    overrides: Overrides = None,
    config: ConfigOption = None,
    print_config: PrintConfig = False,
    ray_address: Address = None,
) -> None:
    """Runs the stages of a config, ending with PPO. Exit code: 0 done, 1 failed, 2 bad config or data, 3 guard."""

    def work() -> None:
        settings = read_config(config, overrides or (), print_config=print_config)
        _run(settings, ray_address)

    run_command(work)


def _run(config: Config, ray_address: str | None) -> None:
    prepared = prepare(config)
    say(prepared.describe())
    connect(ray_address, wait_s=config.placement.wait_s)
    run = open_run(config)
    say(f"run {run.id}, attempt {run.attempt}: {run.path}")
    run_async(run_stages(config, run, prepared, say))
    show_results(run.path)


if __name__ == "__main__":
    typer.run(main)
