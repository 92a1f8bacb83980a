"""The work folder of training without rollouts, from which new workers and drivers continue.

training.json     a digest of the training: the work of another training is deleted
writer            id of the newest try; an older try that still runs must not write
progress.jsonl    a line per try and per optimizer step, appended by rank 0 and read by the driver
errors.jsonl      errors that ended a try, since the driver started
checkpoints/      see checkpoints.py
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import errors
from orchestrator.errors import RlhfError, Superseded
from orchestrator.run.storage import append_line, drop_torn_tail, read_json, replacing, write_json, writing

PROGRESS_FILE = "progress.jsonl"
_TRAINING, _WRITER, _ERRORS = "training.json", "writer", "errors.jsonl"

CONTINUES_AFTER = "continues_after"


def open_work(folder: Path, digest: str) -> bool:
    """Makes the folder, or keeps the work of a training with this digest. Returns whether there was such work.

    Raises StorageError.
    """
    is_kept = (folder / _TRAINING).exists() and read_json(folder / _TRAINING) == {"digest": digest}
    with writing(folder):
        if not is_kept:
            shutil.rmtree(folder, ignore_errors=True)
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / _ERRORS).unlink(missing_ok=True)
        drop_torn_tail(folder / PROGRESS_FILE)
    write_json(folder / _TRAINING, {"digest": digest})
    return is_kept


@dataclass(frozen=True)
class WorkFolder:
    """The folder for the workers of one try. `writer` is the id of the try, equal on all ranks."""

    path: Path
    writer: str

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def claim(self) -> None:
        """Makes this try the writer."""
        with replacing(self.path / _WRITER) as temporary:
            temporary.write_text(self.writer, encoding="utf-8")
        with writing(self.path):
            drop_torn_tail(self.path / PROGRESS_FILE)

    def require_newest(self) -> None:
        """Raises Superseded if a later try has claimed the folder."""
        with writing(self.path):
            newest = (self.path / _WRITER).read_text(encoding="utf-8")
        if newest != self.writer:
            raise Superseded(f"{self.path}: a later try now trains here, so this one stops.")

    def started(self, step: int) -> None:
        """Reports that this try continues after `step` optimizer steps."""
        self._report({CONTINUES_AFTER: step})

    def stepped(self, step: int, metrics: Mapping[str, float]) -> None:
        """Reports the optimizer step number `step`, counted from 0."""
        self._report({"step": step, "metrics": dict(metrics)})

    def _report(self, line: Mapping[str, Any]) -> None:
        append_line(self.path / PROGRESS_FILE, json.dumps(line))

    def failed(self, error: RlhfError) -> None:
        """Records an error of this rank, which the ranks of the next try can raise together."""
        arguments = error.__reduce__()[1]
        append_line(self.path / _ERRORS, json.dumps([type(error).__name__, arguments]))

    def failures(self) -> list[RlhfError]:
        """The recorded errors of earlier tries."""
        return [getattr(errors, name)(*arguments) for name, arguments in _all_lines(self.path / _ERRORS)]


class Lines:
    """Reads lines of JSON as another process appends them."""

    def __init__(self, path: Path) -> None:
        self._path, self.offset = path, 0

    def next(self) -> Any:
        """The next complete line. None: there is none yet."""
        try:
            with self._path.open("rb") as stream:
                stream.seek(self.offset)
                line = stream.readline()
        except FileNotFoundError:
            return None
        if not line.endswith(b"\n"):
            return None
        self.offset += len(line)
        return json.loads(line)


def _all_lines(path: Path) -> list[Any]:
    lines = Lines(path)
    return list(iter(lines.next, None))
