"""`rlhf replay RUN_FOLDER [--until STEP] [--to FOLDER]`: learns again from a run's log (replaying.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.command import imported, run_command

Until = Annotated[int | None, typer.Option("--until", help="Learn steps 0 to UNTIL - 1; default: all that are logged.")]
To = Annotated[Path | None, typer.Option("--to", help="Folder of the result; default: RUN_FOLDER/replay.")]
FromCheckpoint = Annotated[
    bool, typer.Option("--from-checkpoint", help="Start from the run's last checkpoint instead of from step 0.")
]
Address = Annotated[str | None, typer.Option("--ray-address", help="Ray cluster; default: RAY_ADDRESS, else local.")]


def main(
    run_folder: Annotated[Path, typer.Argument(help="Folder of the run: holds config.yaml and log/.")],
    until: Until = None,
    to: To = None,
    from_checkpoint: FromCheckpoint = False,
    ray_address: Address = None,
) -> None:
    """Learns again from a run's log. Exit code: 0 done, 1 failed, 2 no such run, or the log lacks the steps."""

    def work() -> None:
        imported("jobs.stages.work.replay:replay")(run_folder, until, to, ray_address, from_checkpoint=from_checkpoint)

    run_command(work)


if __name__ == "__main__":
    typer.run(main)
