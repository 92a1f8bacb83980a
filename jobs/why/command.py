"""`rlhf why RUN_FOLDER [--json]`: what failed first, how the run reacted, its progress.

And what it waits for now. Reads only the run's folder, in any state, and changes nothing (docs/why.md).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from jobs.why.explain import Explanation, Standing, explain
from jobs.why.failure import GOOD, FirstFailure, moment, title
from jobs.why.reader import read_facts

NO_RUN = 2


def sections(explained: Explanation, folder: Path) -> Iterator[tuple[str, Sequence[str]]]:
    """Headings and their lines, in the order in which they are printed."""
    failure, attempts = explained.first_failure, explained.standing.attempts
    nothing = f"nothing failed in attempt {attempts}" if attempts > 1 else "nothing failed"
    yield "First failure", list(_failure_lines(failure, folder)) if failure else [nothing]
    yield "What was done", explained.done or ["nothing"]
    if explained.earlier:
        yield "Earlier attempts", explained.earlier
    yield "Where it stands", list(_standing_lines(explained.standing))
    yield "Now", explained.now
    if explained.notes:
        yield "Not read", explained.notes


def _failure_lines(failure: FirstFailure, folder: Path) -> Iterator[str]:
    yield f"{title(failure)}, {moment(failure.time)}" + (" (recovered)" if failure.is_answered else "")
    yield f"cause: {failure.cause}" + (f" ({failure.category})" if failure.category else "")
    if failure.node or failure.pid:
        yield f"where: node {failure.node or 'unknown'}, process {failure.pid or 'unknown'}"
    if failure.exit:
        yield f"exit: {failure.exit}"
    if failure.stacks:
        yield f"stacks: {folder / failure.stacks}"
    if failure.log:
        yield "its last lines:"
        yield from (f"  | {line}" for line in failure.log)


def _standing_lines(standing: Standing) -> Iterator[str]:
    yield f"attempts: {standing.attempts}"
    yield "stages: " + ", ".join(f"{name} {state}" for name, state in standing.stages.items())
    if standing.logged is None:
        return
    of = f" of {standing.num_steps}" if standing.num_steps else ""
    yield f"steps committed: {standing.num_committed}{of}" + _up_to(standing.num_committed)
    yield f"last step learned: {'none' if standing.last_learned is None else standing.last_learned}"
    yield f"last checkpoint: {_checkpoint(standing.last_checkpoint)}"
    if standing.best_checkpoint is not None:
        yield f"best checkpoint: {standing.best_checkpoint}"


def _up_to(num_committed: int) -> str:
    return f" (0 to {num_committed - 1})" if num_committed else ""


def _checkpoint(step: int | None) -> str:
    return "none" if step is None else f"before step {step}"


def main(
    run_folder: Annotated[Path, typer.Argument(help="Folder of a run.")],
    as_json: Annotated[bool, typer.Option("--json", help="The same facts as JSON.")] = False,
) -> None:
    """Says what became of a run. Exit code: 0 finished or alive, 1 dead, failed or frozen, 2 no such run."""
    facts = read_facts(run_folder, time.time())
    if facts is None:
        message = f"{run_folder} holds no run: no config.yaml, no attempts, no events. Give the folder of a run."
        typer.echo(f"why: {message}", err=True)
        raise typer.Exit(NO_RUN)
    explained = explain(facts)
    is_good = explained.state in GOOD
    if as_json:
        typer.echo(json.dumps(asdict(explained), indent=1))
    else:
        out = Console(highlight=False, soft_wrap=True)
        out.print(f"{escape(explained.run)}: [bold {'green' if is_good else 'red'}]{explained.state}[/]")
        for heading, lines in sections(explained, run_folder):
            out.print(f"\n[bold]{heading}[/]")
            out.print("\n".join(f"  {escape(line)}" for line in lines))
    raise typer.Exit(0 if is_good else 1)


if __name__ == "__main__":
    typer.run(main)
