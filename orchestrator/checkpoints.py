"""Checkpoints: everything a run needs to go on, complete or not there at all.

checkpoints/step-000010/policy/...     what the policy's ranks wrote
checkpoints/step-000010/critic/...
checkpoints/step-000010/state.json     the coordinator's own state
checkpoints/step-000010/manifest.json  size and SHA-256 of every file
checkpoints/step-000010/COMPLETE       written last; a folder without it is not a checkpoint
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from orchestrator.concurrency import together
from orchestrator.errors import StorageError
from orchestrator.roles import Learner
from orchestrator.storage import read_json, sha256, sync_file, sync_folder, sync_tree, write_json
from orchestrator.types import State

MARKER = "COMPLETE"


class Checkpoints:
    """One run's checkpoints.

    Args:
        folder: where checkpoint folders go; the same storage for every node.
        learners: role name to learner; each writes into its own sub-folder.
        every_steps: save after every so many steps; 0: only after the last.
        last_step: number of steps of the run.
        keep: newest checkpoints kept. The newest complete one is never deleted.
    """

    def __init__(
        self, folder: Path, learners: Mapping[str, Learner], *, every_steps: int, last_step: int, keep: int
    ) -> None:
        self._folder = folder
        self._learners = learners
        self._every_steps = every_steps
        self._last_step = last_step
        self._keep = keep
        folder.mkdir(parents=True, exist_ok=True)

    async def save_if_due(self, state: State) -> None:
        """Saves on schedule, unless that was done, also by an earlier attempt."""
        due = state.step == self._last_step or (self._every_steps and state.step % self._every_steps == 0)
        if due and state.step and not (self._path(state.step) / MARKER).exists():
            await self.save(state)

    async def save(self, state: State) -> None:
        """Writes a checkpoint under a temporary name, proves it on disk, renames it, then retires old ones."""
        final = self._path(state.step)
        temporary = final.with_name(f".{final.name}.tmp")
        await asyncio.to_thread(_make_empty, temporary)
        folders = {role: temporary / role for role in self._learners}
        for folder in folders.values():
            folder.mkdir()
        await together(learner.save(folders[role]) for role, learner in self._learners.items())
        await asyncio.to_thread(_seal, temporary, final, state)
        for path in self.complete()[: -self._keep]:
            await asyncio.to_thread(shutil.rmtree, path)

    async def restore(self) -> State | None:
        """Loads the newest complete checkpoint into the learners. None: there is none.

        Raises:
            StorageError: a file is missing, truncated or altered.
        """
        complete = self.complete()
        if not complete:
            return None
        folder = complete[-1]
        await asyncio.to_thread(verify, folder)
        await together(learner.load(folder / role) for role, learner in self._learners.items())
        return State(**read_json(folder / "state.json"))

    def complete(self) -> list[Path]:
        """Folders of complete checkpoints, oldest first."""
        return sorted(path for path in self._folder.glob("step-*") if (path / MARKER).exists())

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:06d}"


def verify(folder: Path) -> None:
    """Compares every file of a checkpoint with its manifest. Raises StorageError naming the first that differs."""
    for name, entry in read_json(folder / "manifest.json").items():
        path = folder / name
        if not path.is_file():
            problem = "is missing"
        elif path.stat().st_size != entry["num_bytes"]:
            problem = f"has {path.stat().st_size} bytes instead of {entry['num_bytes']}"
        elif sha256(path) != entry["sha256"]:
            problem = "does not match its checksum"
        else:
            continue
        raise StorageError(
            f"checkpoint file {path} {problem}. Restore the file, or delete {folder} to go on from an older checkpoint."
        )


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _seal(temporary: Path, final: Path, state: State) -> None:
    write_json(temporary / "state.json", asdict(state))
    files = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
    manifest = {
        str(path.relative_to(temporary)): {"num_bytes": path.stat().st_size, "sha256": sha256(path)} for path in files
    }
    write_json(temporary / "manifest.json", manifest)
    sync_tree(temporary)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    (final / MARKER).touch()
    sync_file(final / MARKER)
    sync_folder(final)
    sync_folder(final.parent)
