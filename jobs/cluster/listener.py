"""Verifies that a connection reaches this program's process and not another one that took its port.

Any process can bind a port first. So a secret is sent only to a listener that was found in this program's process, and
only over connections made while that process is alive: such a connection reached its socket.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
import psutil
import requests
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool
from urllib3.connection import HTTPConnection

from orchestrator.errors import CapacityError


@dataclass(frozen=True)
class Listener:
    """`process`, of this user, listens on `port` of loopback."""

    process: psutil.Process
    port: int

    def require(self) -> None:
        """Raises CapacityError when the process has ended. Call it after a connection to the port is made."""
        with suppress(psutil.NoSuchProcess):
            if self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE:
                return
        raise CapacityError(
            f"the process of the local Ray that served port {self.port} (pid {self.process.pid}) has ended; what "
            "listens there now may be somebody else's, so nothing is sent to it."
        )


def find_listener(family: Iterable[psutil.Process], port: int) -> Listener | None:
    """The process among `family` that listens on `port`; None: none does."""
    for process in family:
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            for connection in process.net_connections(kind="tcp"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                    return Listener(process, port)
    return None


def checked_session(listener: Listener) -> requests.Session:
    """HTTP without proxies or .netrc, whose every new connection is checked before anything is sent over it."""
    session = requests.Session()
    session.trust_env = False
    session.mount("http://", _CheckedAdapter(listener.require))
    return session


@asynccontextmanager
async def checked_client(listener: Listener) -> AsyncIterator[aiohttp.ClientSession]:
    """The same for aiohttp."""
    async with aiohttp.ClientSession(connector=_CheckedConnector(listener.require)) as client:
        yield client


class _CheckedAdapter(HTTPAdapter):  # type: ignore[misc]  # requests is untyped
    def __init__(self, require: Callable[[], None]) -> None:
        class Connection(HTTPConnection):
            def connect(self) -> None:
                super().connect()
                require()

        class Pool(HTTPConnectionPool):
            ConnectionCls = Connection

        self._pool = Pool
        super().__init__()

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": self._pool}


class _CheckedConnector(aiohttp.TCPConnector):
    def __init__(self, require: Callable[[], None]) -> None:
        super().__init__()
        self._require = require

    async def connect(self, *args: Any, **kwargs: Any) -> Any:
        connection = await super().connect(*args, **kwargs)
        try:
            self._require()
        except BaseException:
            connection.close()
            raise
        return connection
