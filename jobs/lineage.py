"""`rlhf lineage RUN_FOLDER`: the tree of a run's artifacts, each above what it was made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.tree import Tree

from orchestrator.errors import DataError, RlhfError
from orchestrator.run.lineage import LINEAGE_FILE, Made, read_lineage, why_stale

_DIGITS = 8
_MOST_RESULTS = 6


def lineage_tree(run: Path) -> Tree:
    """Final artifacts at the top. An artifact that several others were made from is described once.

    Raises:
        DataError: the folder has no lineage.
        StorageError: its lineage is damaged.
    """
    made = read_lineage(run)
    if not made:
        raise DataError(
            f"{run} has no {LINEAGE_FILE}, or an empty one: give the folder of a run of which a stage has finished."
        )
    by_path = {entry.path: entry for entry in made}
    read = {path for entry in made for path in entry.reads.values()}
    tree = Tree(f"[bold]run {escape(run.resolve().name)}[/]")
    shown: set[str] = set()
    for entry in made:
        if entry.path not in read:
            _add(tree, entry, by_path, shown)
    return tree


def _add(tree: Tree, entry: Made, by_path: Mapping[str, Made], shown: set[str]) -> None:
    if entry.path in shown:
        tree.add(f"{escape(entry.path)}  (above)")
        return
    shown.add(entry.path)
    branch = tree.add("\n".join(map(escape, _lines(entry, by_path))))
    for path in entry.reads.values():
        if path in by_path:
            _add(branch, by_path[path], by_path, shown)
        else:
            branch.add(f"{escape(path)}  (not recorded)")
    for name, digest in entry.contents.items():
        branch.add(f"{escape(name)}  sha256 {digest[:_DIGITS]}, from outside the run")


def _lines(entry: Made, by_path: Mapping[str, Made]) -> Iterator[str]:
    yield f"{entry.path}  {entry.kind}, made by {entry.stage} in attempt {entry.attempt}"
    commit = entry.commit[:_DIGITS] + entry.commit[40:] if entry.commit else "unknown"
    yield f"sha256 {entry.sha256[:_DIGITS]}, config {entry.config_sha256[:_DIGITS]}, commit {commit}"
    if results := list(_numbers(entry.result)):
        yield ", ".join(results[:_MOST_RESULTS])
    if reason := why_stale(entry, by_path):
        yield f"STALE: {reason}"


def _numbers(result: Mapping[str, Any]) -> Sequence[str]:
    """The numbers of a result, in its order, which is by importance."""
    found: list[str] = []
    for name, value in result.items():
        if isinstance(value, Mapping):
            found += _numbers(value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    return found


def main(run_folder: Annotated[Path, typer.Argument(help="Folder of a run.")]) -> None:
    """Prints the artifacts of a run as a tree, each above the artifacts and files that it was made from."""
    try:
        tree = lineage_tree(run_folder)
    except RlhfError as error:
        typer.echo(f"lineage: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    Console(highlight=False).print(tree)


if __name__ == "__main__":
    typer.run(main)
