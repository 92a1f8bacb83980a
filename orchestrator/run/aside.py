"""Sets results of stages aside, so that the stages run again: moves them to set-aside/NNN in the run's folder."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path

from orchestrator.run.lineage import LINEAGE_FILE, read_lineage
from orchestrator.run.storage import write_json, writing

SET_ASIDE = "set-aside"


def new_aside(run: Path) -> Path:
    """Makes the next folder for what is set aside. Raises StorageError."""
    with writing(run / SET_ASIDE):
        (run / SET_ASIDE).mkdir(exist_ok=True)
        numbers = [int(path.name) for path in (run / SET_ASIDE).iterdir() if path.name.isdecimal()]
        folder = run / SET_ASIDE / f"{max(numbers, default=0) + 1:03d}"
        folder.mkdir()
    return folder


def move_aside(run: Path, files: Sequence[Path], aside: Path) -> None:
    """Moves files and folders of the run to the same places below `aside`, in this order. Raises StorageError."""
    for path in files:
        target = aside / path.relative_to(run)
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)


def move_lineage(run: Path, stages: Collection[str], aside: Path) -> None:
    """Moves the entries of stages from the run's lineage to that of `aside`. Raises StorageError."""
    made = read_lineage(run)
    moved = [entry for entry in made if entry.stage in stages]
    for folder, entries in ((aside, moved), (run, [entry for entry in made if entry not in moved])):
        if moved:
            write_json(folder / LINEAGE_FILE, {"artifacts": list(map(asdict, entries))})
