"""Checkpoints: everything a run needs to go on, complete or not there at all.

checkpoints/step-000010/policy/...     what the policy's ranks wrote
checkpoints/step-000010/critic/...
checkpoints/step-000010/state.json     the coordinator's own state
checkpoints/step-000010/manifest.json  size and SHA-256 of every file, and of itself
checkpoints/step-000010/COMPLETE       written last, once every file was found to match; without it, no checkpoint
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import shutil
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from orchestrator.concurrency import cancel, together
from orchestrator.errors import RlhfError, StorageError
from orchestrator.roles import Learner
from orchestrator.storage import (
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
from orchestrator.types import State

MARKER = "COMPLETE"
MANIFEST = "manifest.json"
STATE = "state.json"
# Only what bears exactly these names is ours: a copy under another name is never touched.
_CHECKPOINT = re.compile(r"step-\d{6,}")
_UNFINISHED = re.compile(r"\.step-\d{6,}\.[0-9a-f]{8}\.tmp")

_log = logging.getLogger(__name__)


class Checkpoints:
    """One run's checkpoints.

    Args:
        folder: where checkpoint folders go; the same storage for every node.
        learners: role name to learner; each writes into its own sub-folder.
        every_steps: save after every so many steps; 0: only after the last.
        last_step: number of steps of the run.
        keep: newest checkpoints kept. Older ones go only when the newest was verified on disk; one that can't be
            removed is reported once and tried again after the next save.
        grace_s: how long a stopped run may take to save where it stands.
        fence: called before a checkpoint takes its place; raises when the run is another writer's.

    Raises StorageError from every method that reads or writes, naming the file.
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
    ) -> None:
        self._folder = folder
        self._learners = learners
        self._every_steps = every_steps
        self._last_step = last_step
        self._keep = keep
        self._grace_s = grace_s
        self._fence = fence
        self._damaged: set[Path] = set()
        self._stuck: set[Path] = set()
        self._saving: asyncio.Future[None] | None = None
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    async def save_if_due(self, state: State) -> None:
        """Saves on schedule, unless that was done, also by an earlier attempt."""
        due = state.step == self._last_step or (self._every_steps and state.step % self._every_steps == 0)
        if due and state.step and self._path(state.step) not in self.complete():
            await self.save(state)

    async def begin_if_due(self, state: State, phase: AbstractContextManager[None]) -> None:
        """As `save_if_due`, in `phase` and beside the loop: returns at once. Learning must wait for `settled`."""

        async def save() -> None:
            with phase:
                await self.save_if_due(state)

        await self.settled()
        self._saving = asyncio.ensure_future(save())

    async def settled(self) -> None:
        """Waits for the save that was begun, and raises what it met."""
        if self._saving is not None:
            await asyncio.shield(self._saving)
            self._saving = None

    async def save(self, state: State) -> None:
        """Writes a checkpoint under a temporary name, renames it, proves it on disk, then retires old ones.

        When something can't be written, what was begun is removed and the older checkpoints stay.
        """
        final = self._path(state.step)
        # An earlier save that was cut off may still be writing under its own name.
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
        await asyncio.to_thread(self._retire)

    @asynccontextmanager
    async def saved_on_stop(self) -> AsyncIterator[Callable[[State | None], None]]:
        """Yields a function to be told where the learners stand, None while they learn. A stop (cancellation) of the
        body saves that state, within the grace period; without it the log leads there all the same. No save that was
        begun runs on beyond the context."""
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
        """Loads the newest undamaged checkpoint into the learners. None: there is none at all.

        A damaged one is passed over with a warning, since the log leads forward from any older one. It counts as absent
        from then on, and goes when the next one was saved.

        Raises:
            StorageError: every checkpoint has a file that is missing, truncated or altered.
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
                _log.warning("%s Until then the run goes on from the older %s and its log.", problem, folder)
            await together(learner.load(folder / role) for role, learner in self._learners.items())
            return state
        if problems:
            raise StorageError(
                "no checkpoint can be trusted: " + " ".join(map(str, problems)) + " With all of them deleted, the run "
                "learns again from step 0 of its log."
            )
        return None

    def complete(self) -> list[Path]:
        """Folders of complete checkpoints, oldest first, without those that `restore` found damaged."""
        found = [path for path in self._folders(_CHECKPOINT) if (path / MARKER).exists()]
        return [path for path in found if path not in self._damaged]

    def _folders(self, pattern: re.Pattern[str]) -> list[Path]:
        """Those with a name of ours, oldest first."""
        with reading(self._folder):
            found = (path for path in self._folder.iterdir() if pattern.fullmatch(path.name) and path.is_dir())
            return sorted(found, key=lambda path: (len(path.name), path.name))

    def _retire(self) -> None:
        kept = self.complete()[-self._keep :]
        old = itertools.takewhile(lambda path: kept and path != kept[0], self._folders(_CHECKPOINT))
        for path in {*old, *self._damaged, *self._folders(_UNFINISHED)}:
            try:
                _remove(path)
            except OSError as error:
                if path not in self._stuck:
                    self._stuck.add(path)
                    _log.warning("%s can't be removed (%s); it is left there.", path, error.strerror or error)
        self._damaged = {path for path in self._damaged if path.exists()}

    def _remove_halves(self) -> None:
        """What a save left that was killed: as large as a checkpoint, and of no use."""
        for path in self._folders(_UNFINISHED):
            shutil.rmtree(path, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:06d}"


def verify(folder: Path) -> None:
    """Compares every file of a checkpoint with its manifest. Raises StorageError naming the first that differs."""
    manifest = read_sealed(folder / MANIFEST)
    if STATE not in manifest:
        raise damaged(folder / MANIFEST, f"it does not list {STATE}")
    for name, entry in manifest.items():
        if not isinstance(entry, dict) or entry.keys() != {"num_bytes", "sha256"}:
            raise damaged(folder / MANIFEST, f"its entry {name!r} is not that of a file")
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
        return State(**read_json(folder / STATE))
    except TypeError:
        raise damaged(folder / STATE, "it does not hold the state that this version of the program writes") from None


def _make_empty(temporary: Path, folders: Sequence[Path]) -> None:
    if temporary.exists():
        shutil.rmtree(temporary)
    for folder in (temporary, *folders):
        folder.mkdir()


def _remove(folder: Path) -> None:
    """The marker first: a folder that is half deleted must not look complete."""
    (folder / MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _discard(temporary: Path, final: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    with suppress(OSError):
        if not (final / MARKER).exists():
            shutil.rmtree(final)


def _seal(temporary: Path, final: Path, state: State) -> None:
    write_json(temporary / STATE, asdict(state))
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
