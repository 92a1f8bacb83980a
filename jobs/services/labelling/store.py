"""The store of judgements: SQLite in WAL mode, or PostgreSQL by URL.

A write is committed, and synced to the disk, when the body of `writing` has ended. Writes of one process take turns.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, insert, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError

from jobs.services.labelling.tables import VERSION, about, metadata
from orchestrator.data.outside_text import redacted
from orchestrator.errors import CapacityError, ConfigError, StorageError
from orchestrator.run.storage import replacing

_WAIT_MS = 20_000  # for another process that writes to the file
_SERVICE_LOCK = 0x726C6866  # PostgreSQL's number of the lock that a service holds
_DISK_FULL = "53100"
_LOCK = ".lock"
_SUFFIXES = ("", "-wal", "-shm", "-journal", _LOCK)  # of the files of a store


class StoreFull(StorageError):
    """There is no room for a write. What was committed is safe."""


class Store:
    """Args:
        place: path of an SQLite file, or a URL of SQLAlchemy.

    Raises:
        ConfigError: an unusable URL.
        StorageError: the store can't be opened, or belongs to another version of the program.
    """

    def __init__(self, place: str) -> None:
        self.place = redacted(place)
        self.file = None if "://" in place else Path(place).expanduser().absolute()
        self.engine = self._engine(place)
        self._writer = self.engine.execution_options(writes=True)
        # PostgreSQL's own default lets each statement see another state; SQLite has one by transaction.
        self._reader = self.engine if self.file else self.engine.execution_options(isolation_level="REPEATABLE READ")
        self._lock = threading.Lock()
        self._claim: _Claim | None = None
        self._open()

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that writes. Raises StoreFull or another StorageError; then nothing was written."""
        with self._lock, self._failing("written"):
            self._require_claim()
            with self._writer.begin() as connection:
                yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that sees one state of the store. Raises StorageError."""
        with self._failing("read"), self._reader.begin() as connection:
            yield connection

    @contextmanager
    def served(self) -> Iterator[None]:
        """Claims the store for one service. Raises CapacityError if another one has it."""
        with self._served_file(self.file) if self.file else self._served_database() as is_free:
            if not is_free:
                raise CapacityError(f"another service uses {self.place}; stop it, or use another store.")
            yield

    def require_claim(self) -> None:
        """Raises StorageError: `served` is open, and the store is no longer this service's."""
        with self._lock, self._failing("claimed"):
            self._require_claim()

    def is_served(self) -> bool:
        """Whether a service has claimed the store."""
        with self._served_file(self.file) if self.file else self._served_database() as is_free:
            return not is_free

    def back_up(self, target: Path) -> None:
        """Copies the store while it is in use, whole or not at all.

        Raises:
            ConfigError: it is no SQLite file, or `target` is one of its own.
            StorageError: the copy can't be written, or is damaged.
        """
        if self.file is None:
            raise ConfigError("a PostgreSQL store is backed up with pg_dump.")
        self.require_other(target)
        with replacing(target) as temporary:
            try:
                with closing(sqlite3.connect(self.file)) as source, closing(sqlite3.connect(temporary)) as copy:
                    source.backup(copy)
                    copy.execute("PRAGMA journal_mode=DELETE")
                    found = copy.execute("PRAGMA integrity_check").fetchone()[0]
            except sqlite3.Error as error:
                raise StorageError(f"{target} can't be written ({error}); free space there, or repair it.") from error
            if found != "ok":
                raise StorageError(f"{self.place} is damaged ({found}); restore an earlier backup.")
            temporary.chmod(0o600)

    def require_other(self, out: Path) -> None:
        """Raises ConfigError: writing `out` would replace the store, or a file that SQLite or a service keeps beside
        it."""
        if self.file is None:
            return
        bases = {self.file, self.file.resolve()}  # SQLite keeps its files beside what a link leads to
        own = {base.with_name(f"{base.name}{suffix}").resolve() for base in bases for suffix in _SUFFIXES}
        if out.resolve() in own:
            raise ConfigError(f"{out} is a file of the store {self.place} itself; give another file to write.")

    def close(self) -> None:
        self.engine.dispose()

    def _engine(self, place: str) -> Engine:
        try:
            url = make_url(f"sqlite:///{self.file}" if self.file else place)
            if self.file is None and url.get_backend_name() == "sqlite":
                raise ConfigError("an SQLite store is given as a path: --store labels.db")
            engine = create_engine(url, pool_size=8, max_overflow=40, pool_pre_ping=self.file is None)
        except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
            raise ConfigError(
                f"--store {self.place}: {error}. Give the path of an SQLite file, or "
                "postgresql+psycopg://USER@HOST/NAME (pip install 'rlhf-orchestrator[postgresql]')."
            ) from None
        if self.file is not None:
            event.listen(engine, "connect", _prepare)
            event.listen(engine, "begin", _begin)
        return engine

    def _open(self) -> None:
        if self.file is not None:
            os.close(_opened(self.file))
        with self.writing() as connection:
            metadata.create_all(connection)
            version = connection.scalar(select(about.c.version))
            if version is None:
                connection.execute(insert(about).values(version=VERSION))
        if version not in (None, VERSION):
            raise StorageError(
                f"{self.place} has format {version}, this program reads {VERSION}; use the version that wrote it."
            )

    @contextmanager
    def _failing(self, done: str) -> Iterator[None]:
        try:
            yield
        except IntegrityError:
            raise
        except DBAPIError as error:
            cause: Any = error.orig
            code = getattr(cause, "sqlite_errorcode", None)
            if code == sqlite3.SQLITE_FULL or getattr(cause, "sqlstate", None) == _DISK_FULL:
                raise StoreFull(f"{self.place} is full; free space on its disk.") from error
            if code == sqlite3.SQLITE_NOTADB:
                raise StorageError(f"{self.place} is no SQLite file; give another --store.") from error
            raise StorageError(f"{self.place} can't be {done} ({cause}).") from error

    @contextmanager
    def _served_file(self, file: Path) -> Iterator[bool]:
        with os.fdopen(_opened(file.with_name(f"{file.name}{_LOCK}"))) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
            else:
                yield True

    @contextmanager
    def _served_database(self) -> Iterator[bool]:
        claim = _Claim(self.engine)
        with self._failing("claimed"):
            is_free = claim.holds()
        if is_free:
            self._claim = claim
        try:
            yield is_free
        finally:
            if is_free:
                self._claim = None
                claim.release()

    def _require_claim(self) -> None:
        if self._claim is not None and not self._claim.holds():
            raise StorageError(
                f"another service has taken {self.place}, since the database ended our session; stop one of them."
            )


class _Claim:
    """PostgreSQL's lock of a service. It is a session's, and ends with it: when the database restarts, for example."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._session: Connection | None = None

    def holds(self) -> bool:
        """Whether the lock is this claim's: held, or free and now taken. Raises DBAPIError."""
        if self._session is not None:
            try:
                self._session.scalar(text("SELECT 1"))
            except DBAPIError:
                self._session.close()
                self._session = None
        return self._session is not None or self._take()

    def release(self) -> None:
        if self._session is not None:
            with self._session, suppress(DBAPIError):  # the pool keeps sessions; one that was lost has no lock
                self._session.scalar(text(f"SELECT pg_advisory_unlock({_SERVICE_LOCK})"))

    def _take(self) -> bool:
        with ExitStack() as stack:
            session = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            stack.enter_context(session)
            is_free = bool(session.scalar(text(f"SELECT pg_try_advisory_lock({_SERVICE_LOCK})")))
            if is_free:
                self._session = session
                stack.pop_all()
        return is_free


def _opened(file: Path) -> int:
    """A file that only its owner may read, for it holds what people wrote. Raises StorageError."""
    try:
        return os.open(file, os.O_CREAT | os.O_RDWR, 0o600)
    except OSError as error:
        raise StorageError(f"{file} can't be opened ({error.strerror}); give another --store.") from error


def _prepare(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # transactions begin in _begin
    for setting in (f"busy_timeout={_WAIT_MS}", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {setting}")


def _begin(connection: Connection) -> None:
    writes = connection.get_execution_options().get("writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
