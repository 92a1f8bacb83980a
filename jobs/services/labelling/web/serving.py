"""Runs the service: one process, until it is stopped."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from jobs.command import say
from jobs.services.labelling import people
from jobs.services.labelling.store import Store
from jobs.services.labelling.web.app import Settings, create_app
from orchestrator.errors import CapacityError, ConfigError

_STOP_S = 5  # for requests that are in progress
_MAX_CONNECTIONS = 500


def serve(
    store: Store,
    settings: Settings,
    *,
    host: str,
    port: int,
    certificate: Path | None,
    key: Path | None,
    shows_link: bool = True,
) -> None:
    """Serves until a signal. Makes and prints the admin's link the first time.

    Args:
        shows_link: False where others read what is printed, as in the log of a run: then there is none yet.

    Raises:
        CapacityError: another service has the store, or the port is taken.
        ConfigError: only one of certificate and key.
    """
    if (certificate is None) != (key is None):
        raise ConfigError("--certificate and --key belong together: give both, or none.")
    with store.served(), listening(host, port) as listener:
        address = address_of(host, listener.getsockname()[1], is_encrypted=certificate is not None)
        with store.writing() as connection:
            token = people.new_admin(connection) if shows_link and not people.has_admin(connection) else None
        say(f"labelling {store.place} at {address}")
        if token:
            say(f"the admin's link, shown once: {people.link(address, token)}")
        invite = f"rlhf label invite NAME --store {store.place} --address {address}"
        say(f"links for others: {invite}; with the name admin: the admin's")
        if not is_loopback(host) and certificate is None:
            say("WARNING links and answers travel unencrypted; give --certificate and --key, or a proxy with TLS.")
        run(create_app(store, settings), listener, ssl_certfile=certificate, ssl_keyfile=key)


def run(app: ASGIApp, listener: socket.socket, *, until: Callable[[], bool] = lambda: False, **tls: Any) -> None:
    """Serves until a signal, or until `until` holds, which is called every second in a thread."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_STOP_S,
        limit_concurrency=_MAX_CONNECTIONS,
        proxy_headers=False,  # from loopback anybody could name any address as their own
        http="h11",  # limits the length of headers, which httptools reads without end
        **tls,
    )
    server, ended = uvicorn.Server(config), threading.Event()

    def watch() -> None:
        while not ended.wait(1.0):
            server.should_exit = server.should_exit or until()

    threading.Thread(target=watch, name="until", daemon=True).start()
    try:
        with suppress(KeyboardInterrupt):  # uvicorn raises it again after it has ended
            server.run(sockets=[listener])
    finally:
        ended.set()
    say("stopped; everything that was confirmed is in the store.")


def end_with_input() -> None:
    """From now on this process stops when its standard input ends: when the process that started it has ended."""

    def watch() -> None:
        sys.stdin.buffer.read()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="input", daemon=True).start()


def address_of(host: str, port: int, *, is_encrypted: bool = False) -> str:
    shown = socket.gethostname() if host in ("", "0.0.0.0", "::") else host
    return f"http{'s' if is_encrypted else ''}://{f'[{shown}]' if ':' in shown else shown}:{port}"


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket whose connections wait until the service accepts them. Raises CapacityError: it can't be made."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen()
        except (OSError, OverflowError) as error:
            raise CapacityError(f"{host}:{port} can't be used ({error}); give another --port or --host.") from error
        yield listener
