"""Copies a run to other storage, such as S3, and restores a lost run folder from there.

    MIRROR/RUN-ID/objects/SHA-256              files by content: written once and never changed
    MIRROR/RUN-ID/snapshots/002-000017.json    attempt 2's 17th snapshot: each file's object; sealed, written last

Object stores can't rename or append. So a snapshot is a manifest, which is written after all files that it names.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import pyarrow as pa
from pyarrow import fs

from orchestrator.concurrency import cancel
from orchestrator.errors import ConfigError, RlhfError, StorageError
from orchestrator.run.checkpoints import MARKER
from orchestrator.run.storage import damaged, inside, sealed_bytes, sync_tree, unsealed, writing
from orchestrator.watching.heartbeat import HEARTBEAT_FILE

KEEP = 2
LAST_PUSH_S, STOPPED_PUSH_S = 600.0, 20.0
_BLOCK_BYTES = 8 << 20
# Files that grow during the run. They are read last, so they cover everything else in the snapshot.
_GROWING = (".jsonl",)
_DATABASE = "labels.db"  # a copy of a database that is written to is damaged; the stage `people` makes a sound one
_NAME = re.compile(r"(\d{3,})-(\d{6,})\.json")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MANIFEST_BYTES = 64 << 20


@dataclass(frozen=True)
class Snapshot:
    """One complete copy. `files`: SHA-256 by path in the run folder."""

    name: str
    files: Mapping[str, str]


class Mirror:
    """The copies of one run.

    Args:
        uri: s3://bucket/prefix, gs://..., hdfs://..., or an absolute path. pyarrow finds the credentials;
            `?endpoint_override=host:port&scheme=http` selects an S3 server other than Amazon's.

    All methods raise StorageError if the storage does not answer.
    """

    def __init__(self, uri: str, run_id: str) -> None:
        try:
            self._storage, base = fs.FileSystem.from_uri(uri)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ConfigError(
                f"run.mirror={uri!r} is invalid ({error}). Give a URI such as s3://bucket/prefix, or an absolute path."
            ) from error
        self._uri = uri
        self._objects, self._snapshots = (f"{base.rstrip('/')}/{run_id}/{part}" for part in ("objects", "snapshots"))
        self._lock = threading.Lock()
        # By path: (size, modification time) and the digest at that time.
        self._digests: dict[str, tuple[tuple[int, int], str]] = {}

    def check(self) -> int:
        """Number of snapshots. Raises ConfigError if the bucket is missing."""
        bucket = self._snapshots.partition("/")[0]
        with self._answering():
            if bucket and self._storage.get_file_info(bucket).type == fs.FileType.NotFound:
                raise ConfigError(f"run.mirror={self._uri}: there is no bucket {bucket!r}; create it or set another.")
        return len(self.names())

    def push(self, folder: Path, attempt: int) -> Snapshot | None:
        """Copies new files, then writes the manifest and deletes older snapshots. None: nothing has changed, or a file
        was removed during the copy, for example an old checkpoint."""
        with self._lock, self._answering():
            return self._push(folder, attempt)

    def _push(self, folder: Path, attempt: int) -> Snapshot | None:
        names = self.names()
        newest = self._files(names[-1]) if names else None
        for part in (self._objects, self._snapshots):
            self._storage.create_dir(part, recursive=True)
        try:
            files = {path: self._send(folder / path, path) for path in _settled(folder)}
        except FileNotFoundError:
            return None
        if files == newest:
            return None
        last = max((number for of, number in map(_attempt_and_number, names) if of == attempt), default=0)
        snapshot = Snapshot(f"{attempt:03d}-{last + 1:06d}.json", files)
        self._write(f"{self._snapshots}/{snapshot.name}", sealed_bytes({"files": files}))
        self._retire([*names, snapshot.name])
        return snapshot

    def pull(self, folder: Path) -> Snapshot | None:
        """Restores `folder` from the newest undamaged snapshot, completely or not at all. None: there is no snapshot.

        Raises:
            StorageError: all of them are damaged.
        """
        problems: list[str] = []
        for name in reversed(self.names()):
            temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
            try:
                snapshot = self.read(name)
                with writing(temporary):
                    for path, digest in snapshot.files.items():
                        self._fetch(temporary / path, digest)
                    sync_tree(temporary)
                    temporary.rename(folder)
                return snapshot
            except StorageError as error:
                problems.append(str(error))
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        if problems:
            raise StorageError("no snapshot can be trusted: " + " ".join(problems))
        return None

    def names(self) -> Sequence[str]:
        """Names of the snapshots, oldest first."""
        with self._answering():
            found = self._storage.get_file_info(fs.FileSelector(self._snapshots, allow_not_found=True))
            names = [entry.base_name for entry in found if _NAME.fullmatch(entry.base_name)]
            return sorted(names, key=_attempt_and_number)

    def _send(self, file: Path, path: str) -> str:
        """Stores a file's content unless it is already stored. Returns its SHA-256."""
        stat = file.stat()
        known, digest = self._digests.get(path, (None, ""))
        if known == (stat.st_size, stat.st_mtime_ns):
            return digest
        if file.suffix in _GROWING:
            content = file.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            if not self._holds(digest, len(content)):
                self._write(f"{self._objects}/{digest}", content)
        else:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            if not self._holds(digest, stat.st_size):
                target = f"{self._objects}/{digest}"
                with file.open("rb") as source, self._storage.open_output_stream(target) as stream:
                    shutil.copyfileobj(source, stream, _BLOCK_BYTES)
        self._digests[path] = ((stat.st_size, stat.st_mtime_ns), digest)
        return digest

    def _holds(self, digest: str, num_bytes: int) -> bool:
        found = self._storage.get_file_info(f"{self._objects}/{digest}")
        return bool(found.type == fs.FileType.File and found.size == num_bytes)

    def _fetch(self, file: Path, digest: str) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        found = hashlib.sha256()
        with file.open("wb") as target:
            for block in self._blocks(f"{self._objects}/{digest}"):
                found.update(block)
                target.write(block)
        if found.hexdigest() != digest:
            raise StorageError(f"object {digest} of {self._uri}, file {file.name}, does not match its checksum.")

    def _blocks(self, path: str) -> Iterator[bytes]:
        with self._answering():
            stream = self._storage.open_input_stream(path)
        with stream:
            while True:
                with self._answering():
                    block: bytes = stream.read(_BLOCK_BYTES)
                if not block:
                    return
                yield block

    def read(self, name: str) -> Snapshot:
        """Reads a snapshot's manifest, without its files. Raises StorageError if the manifest is damaged."""
        with self._answering(), self._storage.open_input_stream(f"{self._snapshots}/{name}") as stream:
            content = stream.read(_MANIFEST_BYTES)
        files = unsealed(Path(name), content).get("files")
        if not isinstance(files, dict):
            raise damaged(Path(name), "it names no files")
        for path, digest in files.items():
            inside(Path(name), path)
            if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
                raise damaged(Path(name), f"its entry for {path!r} is not a SHA-256")
        return Snapshot(name, files)

    def _write(self, path: str, content: bytes) -> None:
        with self._storage.open_output_stream(path) as stream:
            stream.write(content)

    def _retire(self, names: Sequence[str]) -> None:
        """Deletes all but the newest snapshots, and the objects that only deleted snapshots used."""
        old, kept = names[:-KEEP], names[-KEEP:]
        if not old:
            return
        kept_files = [self._files(name) for name in kept]
        needed = {digest for files in kept_files for digest in (files or {}).values()}
        for name in old:
            # After a damaged manifest, old or kept, objects stay: some may still be needed.
            files = None if None in kept_files else self._files(name)
            self._storage.delete_file(f"{self._snapshots}/{name}")
            for digest in set((files or {}).values()) - needed:
                if self._storage.get_file_info(f"{self._objects}/{digest}").type == fs.FileType.File:
                    self._storage.delete_file(f"{self._objects}/{digest}")

    def _files(self, name: str) -> Mapping[str, str] | None:
        """The files of a snapshot; None if its manifest is damaged, for example by an interrupted push."""
        with suppress(StorageError):
            return self.read(name).files
        return None

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise StorageError(f"run.mirror={self._uri}: {error}") from error
        except (pa.ArrowException, OSError) as error:
            raise StorageError(f"run.mirror={self._uri} does not answer: {error}") from error


class Mirroring:
    """Pushes regularly while its body runs, and once at its end.

    If the mirror does not answer, only copies are lost, not the run. The problem is reported once and the push retried.

    Args:
        grace_s: time limit of the last push after the body was stopped or failed.
        fence: raises if a newer attempt owns the folder.
        tell: gets lines for the console.
    """

    def __init__(
        self,
        mirror: Mirror,
        folder: Path,
        attempt: int,
        *,
        every_s: float,
        grace_s: float = STOPPED_PUSH_S,
        fence: Callable[[], None],
        tell: Callable[[str], None],
    ) -> None:
        self._mirror, self._folder, self._attempt = mirror, folder, attempt
        self._every_s, self._grace_s, self._fence, self._tell = every_s, grace_s, fence, tell
        self._problem: str | None = None

    async def __aenter__(self) -> Mirroring:
        self._pushing = asyncio.create_task(self._push_on())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await cancel([self._pushing])
        limit_s = LAST_PUSH_S if error is None else self._grace_s
        try:
            await asyncio.wait_for(self._push(), limit_s)
        except TimeoutError:
            self._tell(f"mirror: the last copy was not complete within {limit_s:g} s; the previous copy remains")

    async def _push_on(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            await self._push()

    async def _push(self) -> None:
        try:
            self._fence()
            await _beside(lambda: self._mirror.push(self._folder, self._attempt))
        except RlhfError as error:
            if str(error) != self._problem:
                self._problem = str(error)
                self._tell(f"mirror: {error}")
        else:
            self._problem = None


def _attempt_and_number(name: str) -> tuple[int, int]:
    attempt, number = name.removesuffix(".json").split("-")
    return int(attempt), int(number)


async def _beside(work: Callable[[], object]) -> None:
    """Awaits `work` on a daemon thread, so a storage that never answers does not block the end of the process."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def finish(error: BaseException | None) -> None:
        if not done.done():
            done.set_exception(error) if error else done.set_result(None)

    def run() -> None:
        error: BaseException | None = None
        try:
            work()
        except Exception as raised:  # noqa: BLE001  raised in the awaiting task
            error = raised
        with suppress(RuntimeError):  # the loop is closed: no task waits for the result
            loop.call_soon_threadsafe(finish, error)

    threading.Thread(target=run, name="mirror", daemon=True).start()
    await done


def _settled(folder: Path) -> list[str]:
    """Complete files; growing files come last."""
    incomplete = [path for path in folder.glob("checkpoints/step-*") if not (path / MARKER).exists()]
    found = [
        path.relative_to(folder)
        for path in sorted(folder.rglob("*"))
        # A link may refer to files outside the folder that do not belong to the run.
        if path.is_file() and not path.is_symlink() and not any(parent in incomplete for parent in path.parents)
        if not path.name.startswith(_DATABASE)
    ]
    names = [str(path) for path in found if not any(part.startswith(".") for part in path.parts)]
    return sorted((name for name in names if name != HEARTBEAT_FILE), key=lambda name: name.endswith(_GROWING))
