"""`rlhf run --config FILE [section.key=value ...]`: the main job, with the stages that the config names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from jobs.command import imported, read_config, run_command, say
from jobs.rerun import rerun_of, stale_lines
from jobs.stages.table import logged_stage, stages_of, to_do
from orchestrator.config.config import Config
from orchestrator.run.folder import existing_run, refuse_existing, restore_lost

ConfigOption = Annotated[Path | None, typer.Option("--config", help="YAML file; without it all defaults.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides such as rl.steps=10.")]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Print the resolved config and exit.")]
Resume = Annotated[
    Literal["auto", "never"],
    typer.Option(
        "--resume", help="auto: continues the run that run.id names, if it exists; never: refuses in that case."
    ),
]
From = Annotated[
    str | None,
    typer.Option(
        "--from", help="Run this stage of run.id again, and all that read from it. Their results are set aside."
    ),
]
Only = Annotated[str | None, typer.Option("--only", help="Run this stage and no other.")]
Address = Annotated[str | None, typer.Option("--ray-address", help="Ray cluster; default: RAY_ADDRESS, else local.")]


def main(
    overrides: Overrides = None,
    config: ConfigOption = None,
    print_config: PrintConfig = False,
    resume: Resume = "auto",
    begin: From = None,
    only: Only = None,
    ray_address: Address = None,
) -> None:
    """Runs the stages of a config. Exit code: 0 done, 1 failed, 2 bad config or data, 3 guard."""

    def work() -> None:
        settings = read_config(config, overrides or (), print_config=print_config)
        run_config(settings, resume=resume, ray_address=ray_address, begin=begin, only=only)

    run_command(work)


def reward_model(
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides such as reward_model.epochs=2.")] = None,
    config: ConfigOption = None,
    print_config: PrintConfig = False,
    ray_address: Address = None,
) -> None:
    """Trains a reward model on preferences.path. Exit code: 0 done, 1 failed, 2 bad config, data or cluster."""

    def work() -> None:
        settings = read_config(config, overrides or (), print_config=print_config)
        imported("jobs.stages.work.reward_model:run_alone")(settings, ray_address)

    run_command(work)


def run_config(
    config: Config,
    *,
    resume: str = "auto",
    ray_address: str | None = None,
    begin: str | None = None,
    only: str | None = None,
) -> None:
    """Starts or continues the run of a config, with one or several stages.

    Args:
        begin, only: names of stages, see jobs/rerun.py.
    """
    restored = restore_lost(config)
    if restored:
        say(restored)
    if resume == "never":
        refuse_existing(config)
    stages = stages_of(config)
    there = existing_run(config)
    is_rerun = begin is not None or only is not None
    if there is not None and not is_rerun and not list(to_do(stages, there)):
        for line in stale_lines(stages, there):
            say(line)
        logged = logged_stage(config)
        more = f" {logged.stage.steps_key}=N makes it longer." if logged else ""
        say(f"run {there.id} has finished; nothing is left to do.{more}")
        imported("jobs.report.results:show_results")(there.path)
        return
    config = imported("jobs.resolve:resolved")(config)
    say("checking data, models and rewards ...")
    rerun = rerun_of(config, begin=begin, only=only) if is_rerun else None
    prepared = imported("jobs.check.preflight:checked")(config, *([rerun.compare] if rerun else []))
    imported("jobs.main_job:run_job")(config, prepared, ray_address, rerun)


if __name__ == "__main__":
    typer.run(main)
