"""Checkpoints of training without rollouts, in its work folder; all ranks write them together.

checkpoints/step-000025/     the learner's state after 25 optimizer steps; only the newest is kept
checkpoints/.step-000050...  a checkpoint being written: synced, then renamed, so it is complete or absent
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Protocol

from actors.learning.distributed import Group, on_rank_0
from actors.training.work import WorkFolder
from orchestrator.run.storage import make_empty, reading, sync_folder, sync_tree, writing

_NAME = re.compile(r"step-(\d{6,})")


class Saved(Protocol):
    """The methods of a learner that checkpoints use; see actors.learning.learner.Learner. Both are collective."""

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


class TrainingCheckpoints:
    """Args:
    work: the work folder, on storage that all ranks share.

    All methods raise StorageError.
    """

    def __init__(self, work: WorkFolder, learner: Saved, group: Group) -> None:
        self._work, self._folder = work, work.checkpoints
        self._learner, self._group = learner, group

    def restore(self) -> int:
        """Loads the newest checkpoint. Returns its number of optimizer steps; 0: there is none."""
        step = on_rank_0(self._newest, self._group)
        if step:
            self._learner.load(self._path(step))
        return step

    def save(self, step: int) -> None:
        """Writes a checkpoint of the learner after `step` optimizer steps, and removes the previous one."""
        final = self._path(step)
        temporary = final.with_name(f".{final.name}.{self._work.writer}.tmp")
        on_rank_0(lambda: make_empty(temporary), self._group)
        self._learner.save(temporary)
        on_rank_0(lambda: self._put_in_place(temporary, final), self._group)

    def _newest(self) -> int:
        """Removes remains of killed saves."""
        with reading(self._folder):
            names = [path.name for path in self._folder.iterdir()]
        for name in names:
            if not _NAME.fullmatch(name):
                shutil.rmtree(self._folder / name, ignore_errors=True)
        return max((int(found[1]) for found in map(_NAME.fullmatch, names) if found), default=0)

    def _put_in_place(self, temporary: Path, final: Path) -> None:
        self._work.require_newest()
        with writing(temporary):
            sync_tree(temporary)
            temporary.rename(final)
            sync_folder(self._folder)
        for path in self._folder.iterdir():
            if path != final:
                shutil.rmtree(path, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:06d}"
