"""Checkpoints: the state that a run needs to continue. A checkpoint is complete or does not count.

checkpoints/step-000010/policy/...     files of the policy's ranks
checkpoints/step-000010/critic/...
checkpoints/step-000010/state.json     the coordinator's state
checkpoints/step-000010/manifest.json  size and SHA-256 of every file, and of itself
checkpoints/step-000010/COMPLETE       written last, after all files are verified; without it there is no checkpoint
checkpoints/best.json                  the best checkpoint by evaluation
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import re
import shutil
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from orchestrator.concurrency import cancel, together
from orchestrator.errors import RlhfError, StorageError
from orchestrator.roles import Learner
from orchestrator.run.best import BEST_FILE, Best
from orchestrator.run.storage import (
    damaged,
    inside,
    read_json,
    read_sealed,
    reading,
    sha256,
    sync_file,
    sync_folder,
    sync_tree,
    write_json,
    write_sealed,
    writing,
)
from orchestrator.types import Moments, State

MARKER = "COMPLETE"
MANIFEST = "manifest.json"
STATE = "state.json"
# Only folders with exactly these names are managed: a copy under another name is never touched.
_CHECKPOINT = re.compile(r"step-\d{6,}")
_UNFINISHED = re.compile(r"\.step-\d{6,}\.[0-9a-f]{8}\.tmp")

_log = logging.getLogger(__name__)


class Checkpoints:
    """One run's checkpoints.

    Args:
        folder: folder of all checkpoints, on storage that all nodes share.
        learners: learner by role; each writes to its own sub-folder.
        every_steps: steps between checkpoints; 0: only after the last.
        last_step: number of steps of the run.
        keep: number of newest checkpoints to keep, in addition to the best. Older ones are removed after the newest is
            verified on disk. A failed removal is reported once and retried after the next save.
        best: selects the best step among scheduled checkpoints and the best so far. Checkpoints of a stop are not
            candidates, so a stopped run keeps the same checkpoint as an uninterrupted run.
        grace_s: time limit for saving the state of a stopped run.
        fence: called before a checkpoint becomes visible; raises if a newer attempt is writing the run.

    Methods that read or write raise StorageError, which names the file.
    """

    def __init__(
        self,
        folder: Path,
        learners: Mapping[str, Learner],
        *,
        every_steps: int,
        last_step: int,
        keep: int,
        grace_s: float = 30.0,
        fence: Callable[[], None] = lambda: None,
        best: Callable[[Iterable[int]], Best | None] = lambda steps: None,
    ) -> None:
        self._folder = folder
        self._learners = learners
        self._every_steps = every_steps
        self._last_step = last_step
        self._keep = keep
        self._grace_s = grace_s
        self._fence = fence
        self._best = best
        self._damaged: set[Path] = set()
        self._stuck: set[Path] = set()
        self._saving: asyncio.Future[None] | None = None
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    async def save_if_due(self, state: State) -> None:
        """Saves on schedule, unless the step is already saved, possibly by an earlier attempt."""
        if not self._is_due(state.step):
            return
        if self._path(state.step) not in self.complete():
            await self.save(state)
        else:  # that attempt may have ended before it removed old ones
            await asyncio.to_thread(self._retire, self._path(state.step))

    def _is_due(self, step: int) -> bool:
        is_on_schedule = bool(self._every_steps) and step % self._every_steps == 0
        return step > 0 and (step == self._last_step or is_on_schedule)

    async def begin_if_due(self, state: State, phase: AbstractContextManager[None]) -> None:
        """Starts `save_if_due` in the background, in `phase`. Learning must wait for `settled`."""

        async def save() -> None:
            with phase:
                await self.save_if_due(state)

        await self.settled()
        self._saving = asyncio.ensure_future(save())

    async def settled(self) -> None:
        """Waits for the save in progress, and raises its error."""
        if self._saving is not None:
            await asyncio.shield(self._saving)
            self._saving = None

    async def save(self, state: State) -> None:
        """Writes a checkpoint under a temporary name, renames it, verifies it on disk, then removes old ones.

        If a write fails, the incomplete checkpoint is removed and older ones stay.
        """
        final = self._path(state.step)
        # An earlier save that was interrupted may still be writing under its name.
        temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.tmp")
        folders = {role: temporary / role for role in self._learners}
        try:
            with writing(temporary):
                await asyncio.to_thread(_make_empty, temporary, list(folders.values()))
                await together(learner.save(folders[role]) for role, learner in self._learners.items())
                self._fence()
                await asyncio.to_thread(_seal, temporary, final, state)
        except RlhfError:
            await asyncio.to_thread(_discard, temporary, final)
            raise
        except asyncio.CancelledError:
            await asyncio.to_thread(shutil.rmtree, temporary, ignore_errors=True)
            raise
        self._damaged.discard(final)
        await asyncio.to_thread(self._retire, final)

    @asynccontextmanager
    async def saved_on_stop(self) -> AsyncIterator[Callable[[State | None], None]]:
        """Yields a function that takes the learners' current state, None while they learn. If the body is cancelled,
        that state is saved within the grace period; if this fails, learning again from the log gives the same state. No
        save continues after the context."""
        standing: list[State | None] = [None]
        try:
            yield lambda state: standing.__setitem__(0, state)
            await self.settled()
        except asyncio.CancelledError:
            with suppress(RlhfError, TimeoutError):
                await asyncio.wait_for(self._save_standing(*standing), self._grace_s)
            raise
        finally:
            saving, self._saving = self._saving, None
            await cancel([saving] if saving else [])

    async def _save_standing(self, state: State | None) -> None:
        await self.settled()
        if state is not None and state.step and self._path(state.step) not in self.complete():
            await self.save(state)

    async def restore(self) -> State | None:
        """Loads the newest undamaged checkpoint into the learners. None: there is no checkpoint.

        A damaged checkpoint is skipped with a warning, because the log contains the steps after any older one. It is
        removed after the next save.

        Raises:
            StorageError: all checkpoints have files that are missing, truncated or altered.
        """
        await asyncio.to_thread(self._remove_halves)
        problems: list[StorageError] = []
        for folder in reversed(self.complete()):
            try:
                state = await asyncio.to_thread(_verified_state, folder)
            except StorageError as error:
                problems.append(error)
                self._damaged.add(folder)
                continue
            for problem in problems:
                _log.warning("%s Until then the run continues from the older %s and its log.", problem, folder)
            await self._load(folder)
            return state
        if problems:
            raise StorageError(
                "no checkpoint can be trusted: " + " ".join(map(str, problems)) + " With all of them deleted, the run "
                "learns again from step 0 of its log."
            )
        return None

    def complete(self) -> list[Path]:
        """Folders of complete checkpoints, oldest first, except those that `restore` found damaged."""
        return [path for path in complete_checkpoints(self._folder) if path not in self._damaged]

    async def load_best(self) -> Best | None:
        """Loads the best checkpoint into the learners. None: there is none, or it is the last step.

        Raises:
            StorageError: the checkpoint was altered.
        """
        best = read_best(self._folder)
        if best is None or best.step == self._last_step:
            return None
        folder = self._path(best.step)
        await asyncio.to_thread(verify, folder)
        await self._load(folder)
        return best

    async def _load(self, folder: Path) -> None:
        await together(learner.load(folder / role) for role, learner in self._learners.items())

    def _choose_best(self) -> Path | None:
        """Writes the best checkpoint to best.json and returns it."""
        before = read_best(self._folder)
        steps = [int(path.name.removeprefix("step-")) for path in self.complete()]
        best = self._best(step for step in steps if self._is_due(step) or (before and step == before.step))
        if best is None:
            with writing(self._folder):
                (self._folder / BEST_FILE).unlink(missing_ok=True)
            return None
        if best != before:
            write_json(self._folder / BEST_FILE, asdict(best))
        return self._path(best.step)

    def _retire(self, saved: Path) -> None:
        best = self._choose_best()
        kept = self.complete()[-self._keep :]
        older = itertools.takewhile(lambda path: kept and path != kept[0], _folders(self._folder, _CHECKPOINT))
        old = [path for path in older if path not in (saved, best)]
        for path in {*old, *self._damaged, *_folders(self._folder, _UNFINISHED)}:
            try:
                _remove(path)
            except OSError as error:
                if path not in self._stuck:
                    self._stuck.add(path)
                    _log.warning("%s can't be removed (%s); it is left there.", path, error.strerror or error)
        self._damaged = {path for path in self._damaged if path.exists()}

    def _remove_halves(self) -> None:
        """Removes incomplete checkpoints of killed saves."""
        for path in _folders(self._folder, _UNFINISHED):
            shutil.rmtree(path, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:06d}"


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest first; empty if the folder is missing. Raises StorageError."""
    return [path for path in _folders(folder, _CHECKPOINT) if (path / MARKER).exists()]


def is_complete(folder: Path, step: int) -> bool:
    """Whether the folder contains a complete checkpoint of the step."""
    return (folder / f"step-{step:06d}" / MARKER).exists()


def read_best(folder: Path) -> Best | None:
    """Reads best.json in the folder of checkpoints. None: it is missing, damaged or out of date."""
    try:
        best = Best(**json.loads((folder / BEST_FILE).read_text(encoding="utf-8")))
        return best if (folder / f"step-{best.step:06d}" / MARKER).exists() else None
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _folders(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """Folders with matching names, oldest first."""
    with reading(folder):
        if not folder.exists():
            return []
        found = (path for path in folder.iterdir() if pattern.fullmatch(path.name) and path.is_dir())
        return sorted(found, key=lambda path: (len(path.name), path.name))


def verify(folder: Path) -> None:
    """Compares all files of a checkpoint with its manifest. Raises StorageError, which names the first difference."""
    manifest = read_sealed(folder / MANIFEST)
    if STATE not in manifest:
        raise damaged(folder / MANIFEST, f"it does not list {STATE}")
    for name, entry in manifest.items():
        if not isinstance(entry, dict) or entry.keys() != {"num_bytes", "sha256"}:
            raise damaged(folder / MANIFEST, f"its entry {name!r} does not describe a file")
        path = inside(folder, name)
        with reading(path):
            problem = _difference(path, entry["num_bytes"], entry["sha256"])
        if problem:
            raise StorageError(f"checkpoint file {path} {problem}. Restore it from a copy, or delete {folder}.")


def _difference(path: Path, num_bytes: int, digest: str) -> str | None:
    if not path.is_file():
        return "is missing"
    found = path.stat().st_size
    if found != num_bytes:
        return f"has {found} bytes instead of {num_bytes}"
    return None if sha256(path) == digest else "does not match its checksum"


def _verified_state(folder: Path) -> State:
    verify(folder)
    try:
        entries = read_json(folder / STATE)
        moments = {name: Moments(**of_part) for name, of_part in entries.pop("part_moments", {}).items()}
        return State(**entries, part_moments=moments)
    except (AttributeError, TypeError):
        raise damaged(folder / STATE, "it does not contain the state of this version of the program") from None


def _make_empty(temporary: Path, folders: Sequence[Path]) -> None:
    if temporary.exists():
        shutil.rmtree(temporary)
    for folder in (temporary, *folders):
        folder.mkdir()


def _remove(folder: Path) -> None:
    """Removes the marker first: a partly deleted folder must not look complete."""
    (folder / MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _discard(temporary: Path, final: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    with suppress(OSError):
        if not (final / MARKER).exists():
            shutil.rmtree(final)


def _seal(temporary: Path, final: Path, state: State) -> None:
    write_json(temporary / STATE, {key: value for key, value in asdict(state).items() if value != {}})
    files = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
    manifest = {
        str(path.relative_to(temporary)): {"num_bytes": path.stat().st_size, "sha256": sha256(path)} for path in files
    }
    write_sealed(temporary / MANIFEST, manifest)
    sync_tree(temporary)
    if final.exists():
        _remove(final)
    temporary.rename(final)
    sync_folder(final.parent)
    verify(final)
    (final / MARKER).touch()
    sync_file(final / MARKER)
    sync_folder(final)
    sync_folder(final.parent)
