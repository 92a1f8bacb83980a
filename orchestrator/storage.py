"""Files that are either whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.errors import StorageError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on a clean exit it is synced and takes the place of `path`.

    Raises StorageError naming the file when the disk is full, permission is missing or the folder is gone.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        sync_file(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise StorageError(f"{path} can't be written ({error.strerror}); free space or fix permissions.") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"{path} can't be read ({error.strerror}).") from None
    except ValueError:
        raise StorageError(f"{path} is damaged: it holds no valid JSON. Restore it or delete its folder.") from None


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    sync_file(path)


def sync_tree(folder: Path) -> None:
    """Syncs every file and folder below `folder`, itself included."""
    for path in folder.rglob("*"):
        sync_file(path)
    sync_folder(folder)
