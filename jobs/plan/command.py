"""`rlhf plan --config FILE [--gpus N --gpu-kind h100] [section.key=value ...]`: estimates a run.

The loop runs over simulated roles, once for each layout: step time, idle shares, memory, duration of the run and price,
the fastest first; then layouts that do not fit, and the way out. No weights are read and no actor is started.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.command import imported, read_config, run_command


def main(  # noqa: PLR0913  one parameter per option
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides such as rl.prompts_per_step=512.")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML file; without it all defaults.")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs to plan for; default: those of the cluster.")] = None,
    gpu_kind: Annotated[str | None, typer.Option(help="h100, h200, h20, a100, a800 or l40s.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes of the GPUs; default: 8 GPUs per node.")] = None,
    price: Annotated[float | None, typer.Option(min=0.0, help="US dollars per GPU and hour.")] = None,
    prompt_tokens: Annotated[float | None, typer.Option(min=1.0, help="Mean prompt; default: the longest.")] = None,
    response_tokens: Annotated[float | None, typer.Option(min=1.0, help="Mean response; default: the longest.")] = None,
    spread: Annotated[float, typer.Option(min=0.0, help="Standard deviation of responses over their mean.")] = 0.5,
    kept: Annotated[
        float,
        typer.Option(min=0.01, max=1.0, help="Share of prompts that dynamic sampling keeps, if the config has it."),
    ] = 0.5,
    ray_address: Annotated[
        str | None, typer.Option("--ray-address", help="Ray cluster; default: RAY_ADDRESS, else this machine.")
    ] = None,
) -> None:
    """Plans a run without starting anything. Exit code: 0 something fits, 2 nothing does, or the config is bad."""

    def work() -> None:
        settings = read_config(config, overrides or (), print_config=False)
        target = imported("jobs.plan.report:Target")(gpus, gpu_kind, nodes, price, ray_address)
        lengths = imported("jobs.plan.report:MeanLengths")(prompt_tokens, response_tokens, spread)
        imported("jobs.plan.report:plan")(settings, target, lengths, kept=kept)

    run_command(work)


if __name__ == "__main__":
    typer.run(main)
