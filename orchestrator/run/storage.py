"""Writes files completely or not at all."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from orchestrator.errors import StorageError

_SEAL = "sha256"
# Errors of storage that lacks an operation: FUSE and SMB mounts lack hard links, some can't sync a folder.
_UNSUPPORTED = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL})
_NO_LINKS = _UNSUPPORTED | {errno.EPERM, errno.EACCES, errno.EMLINK, errno.EXDEV}
# A claim this old belongs to a writer that died between its claim and its file.
_STALE_CLAIM_S = 60.0
_WAYS_OUT = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space there, or raise the quota",
    errno.EACCES: "fix its permissions",
    errno.EPERM: "fix its permissions",
    errno.EROFS: "mount the storage writable again",
    errno.ENOENT: "put its folder back",
    errno.ENOTDIR: "put its folder back",
}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Converts an OSError of the body to a StorageError that names the failed file, or `path` if it is unknown."""
    try:
        yield
    except OSError as error:
        raise _not_written(error.filename or path, error) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Converts an OSError of the body to a StorageError that names `path`."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path} can't be read ({error.strerror or error}).") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path next to `path`; on a clean exit it is synced and replaces `path`.

    Raises StorageError, which names the file, if the disk is full or the folder is missing or not writable.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        sync_file(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise _not_written(path, error) from error
    finally:
        with suppress(OSError):  # on a disk that became read-only, removing a missing file fails too
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(_as_json(content), encoding="utf-8")


def read_json(path: Path) -> Any:
    with reading(path):
        content = path.read_bytes()
    return _parsed(path, content)


def _parsed(path: Path, content: bytes) -> Any:
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError):
        raise damaged(path, "it is not valid JSON") from None


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object that contains its own checksum."""
    write_json(path, _sealed(content))


def create_sealed(path: Path, content: Mapping[str, Any]) -> bool:
    """As `write_sealed`, but the file must not exist: one of several writers succeeds. False: another writer did."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_bytes(sealed_bytes(content))
        sync_file(temporary)
        _move_if_absent(temporary, path)
        sync_folder(path.parent)
    except FileExistsError:
        return False
    except OSError as error:
        raise _not_written(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return True


def read_sealed(path: Path) -> dict[str, Any]:
    """Reads a file of `write_sealed`. Accepts an object without a checksum, from earlier versions.

    Raises StorageError if the file can't be read or was altered.
    """
    with reading(path):
        content = path.read_bytes()
    return unsealed(path, content)


def sealed_bytes(content: Mapping[str, Any]) -> bytes:
    """The bytes that `write_sealed` writes."""
    return _as_json(_sealed(content)).encode("utf-8")


def unsealed(path: Path, written: bytes) -> dict[str, Any]:
    """As `read_sealed`, from bytes; `path` is the name in errors."""
    content = _parsed(path, written)
    if not isinstance(content, dict):
        raise damaged(path, "it is not a JSON object")
    seal = content.pop(_SEAL, None)
    if seal is not None and seal != _seal(content):
        raise damaged(path, "it does not match its own checksum")
    return content


def damaged(path: Path, problem: str) -> StorageError:
    return StorageError(f"{path} is damaged: {problem}. Restore it from a copy, or delete its folder.")


def append_line(path: Path, line: str) -> None:
    """Appends a line to a file and syncs it. On a full disk the file is unchanged.

    Raises StorageError, which names the file.
    """
    is_new = not path.exists()
    with writing(path):
        with path.open("ab", buffering=0) as stream:
            _append_whole(stream, f"{line}\n".encode())
            os.fsync(stream.fileno())
        if is_new:
            sync_folder(path.parent)


def _append_whole(stream: io.FileIO, data: bytes) -> None:
    """Removes a partly written line, which would damage later lines too."""
    size = stream.tell()
    try:
        written = 0
        while written < len(data):
            written += stream.write(data[written:])
    except OSError:
        stream.truncate(size)
        raise


def drop_torn_tail(path: Path) -> None:
    """Removes an incomplete last line, left by a killed writer."""
    with suppress(FileNotFoundError), path.open("rb+") as stream:
        content = stream.read()
        stream.truncate(content.rfind(b"\n") + 1)


def sha256(path: Path) -> str:
    with reading(path), path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def inside(folder: Path, name: str) -> Path:
    """`folder / name` for a name from a manifest, which must be relative and stay inside the folder.

    Raises StorageError, which names the entry.
    """
    path = PurePosixPath(name)
    if not path.parts or "\0" in name or path.is_absolute() or ".." in path.parts or str(path) != name:
        raise damaged(folder, f"its manifest names the file {name!r}, which is not inside it")
    return folder / path


def make_empty(folder: Path) -> None:
    """Creates an empty folder; deletes existing content. Raises StorageError."""
    with writing(folder):
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)


def follow_umask(folder: Path) -> None:
    """Gives every file below `folder` the mode of the umask, because safetensors writes files as 0600."""
    probe = folder / f".{uuid.uuid4().hex[:8]}.tmp"
    probe.touch()
    try:
        mode = probe.stat().st_mode & 0o777
    finally:
        probe.unlink(missing_ok=True)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with suppress(PermissionError, NotImplementedError):  # FUSE and SMB mounts may not store modes
                path.chmod(mode)


def sync_file(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        error.filename = str(path)  # fsync works on a descriptor and names none
        raise


def sync_folder(path: Path) -> None:
    """Syncs a folder's entries, if its storage supports that."""
    try:
        sync_file(path)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def sync_tree(folder: Path) -> None:
    """Syncs `folder` and all files and folders below it."""
    for path in folder.rglob("*"):
        sync_folder(path) if path.is_dir() else sync_file(path)
    sync_folder(folder)


def _move_if_absent(source: Path, target: Path) -> None:
    """Raises FileExistsError if `target` exists. Storage without hard links needs an exclusive claim."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with _claimed(target, source):
            if target.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
            os.replace(source, target)


@contextmanager
def _claimed(target: Path, fresh: Path) -> Iterator[None]:
    """Holds a claim on `target`. `fresh`: a newly written file, which gives the storage's current time.

    Raises FileExistsError while another writer holds the claim.
    """
    claim = target.with_name(f".{target.name}.claim")
    with suppress(FileNotFoundError):
        if fresh.stat().st_mtime - claim.stat().st_mtime > _STALE_CLAIM_S:
            claim.unlink()
    claim.touch(exist_ok=False)
    try:
        yield
    finally:
        claim.unlink(missing_ok=True)


def _as_json(content: Any) -> str:
    return json.dumps(content, indent=1) + "\n"


def _not_written(path: Path | str, error: OSError) -> StorageError:
    reason = error.strerror or error
    way_out = _WAYS_OUT.get(error.errno or 0, "check its storage")
    return StorageError(f"{path} can't be written ({reason}); {way_out}.")


def _sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    return {**content, _SEAL: _seal(content)}


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("ascii")).hexdigest()
