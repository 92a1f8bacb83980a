"""`rlhf check --config FILE [section.key=value ...]`: checks a run before anything is started.

Data, tokenizer and template, batch arithmetic, rewards, placement, memory and disk. No weights are read and no actor is
started. If RAY_ADDRESS or --ray-address names a cluster, the plan is tried with its nodes. With --cluster, processes on
all nodes look at GPUs, drivers and packages, connect to each other, and form the process groups of the run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.command import imported, read_config, run_command


def main(
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides such as rl.steps=10.")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML file; without it all defaults.")] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the resolved config and exit.")] = False,
    ray_address: Annotated[
        str | None, typer.Option("--ray-address", help="Ray cluster; default: RAY_ADDRESS, else this machine.")
    ] = None,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Also probe the cluster's nodes: devices, network, process groups.")
    ] = False,
) -> None:
    """Checks a config before anything is started. Exit code: 0 a run can start, 2 it can't."""

    def work() -> None:
        settings = read_config(config, overrides or (), print_config=print_config)
        imported("jobs.check.report:check")(settings, ray_address, probes=cluster)

    run_command(work)


if __name__ == "__main__":
    typer.run(main)
