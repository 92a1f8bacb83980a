"""The model that training produces: written to a temporary folder, then renamed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from actors.learning.distributed import Group, on_rank_0
from actors.learning.learner import Learner
from actors.text.conversations import Chat
from orchestrator.run.storage import follow_umask, make_empty, sync_tree, writing

Kept = TypeVar("Kept")


def make_artifact(
    learner: Learner, chat: Chat, folder: Path, work: Path, group: Group, complete: Callable[[Path], Kept]
) -> Kept:
    """Collective. Exports the trained model to `folder`, completely or not at all.

    Args:
        work: folder for the unfinished model, on the file system of `folder`.
        complete: adds files other than weights and tokenizer, and returns a value for all ranks; called
            on rank 0 with the unfinished folder.

    Raises:
        StorageError: on all ranks.
    """
    unfinished = work / "model"
    on_rank_0(lambda: make_empty(unfinished), group)
    learner.export(unfinished, chat.tokenizer)

    def publish() -> Kept:
        with writing(unfinished):
            kept = complete(unfinished)
            follow_umask(unfinished)
            sync_tree(unfinished)
            _replace_folder(unfinished, folder)
        return kept

    return on_rank_0(publish, group)


def _replace_folder(source: Path, target: Path) -> None:
    replaced = source.with_name("replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.rename(replaced)
    source.rename(target)
