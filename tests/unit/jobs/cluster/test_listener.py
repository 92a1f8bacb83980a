"""A secret is sent only to this user's process, not to another that took its port."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import psutil
import pytest

from jobs.cluster.listener import Listener, checked_client, checked_session, find_listener
from orchestrator.errors import CapacityError
from tests.deadlines import scaled

SECRET = {"Authorization": "Bearer secret"}


@pytest.fixture
def stranger() -> Iterator[tuple[int, list[bytes]]]:
    """Listens, and records what it receives."""
    got: list[bytes] = []

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(2)
                got.append(connection.recv(4096))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = threading.Thread(target=serve, args=(listener,), daemon=True)
        serving.start()
        yield listener.getsockname()[1], got
        listener.shutdown(socket.SHUT_RDWR)
    serving.join(5)


@pytest.fixture
def dead() -> psutil.Process:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    known = psutil.Process(process.pid)
    process.communicate()
    return known


def test_who_took_the_port_of_a_dead_process_gets_nothing(
    stranger: tuple[int, list[bytes]], dead: psutil.Process
) -> None:
    port, got = stranger
    listener = Listener(dead, port)
    with checked_session(listener) as session, pytest.raises(CapacityError, match="may be somebody else's"):
        session.get(f"http://127.0.0.1:{port}/api/jobs/", headers=SECRET, timeout=scaled(5))

    async def follow() -> None:
        async with checked_client(listener) as client:
            await client.ws_connect(f"http://127.0.0.1:{port}/tail", headers=SECRET)

    with pytest.raises(CapacityError, match="may be somebody else's"):
        asyncio.run(follow())
    assert b"".join(got) == b""


def test_a_port_of_somebody_else_is_not_found_in_the_family(stranger: tuple[int, list[bytes]]) -> None:
    port, _ = stranger
    assert find_listener([psutil.Process().parent()], port) is None
    found = find_listener([psutil.Process()], port)
    assert found is not None and found.process.pid == psutil.Process().pid


def test_the_process_that_listens_is_reached_without_proxy_and_netrc(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append(self.headers["Authorization"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: object) -> None: ...

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        listener = find_listener([psutil.Process()], server.server_port)
        assert listener is not None
        with checked_session(listener) as session:
            answer = session.get(f"http://127.0.0.1:{server.server_port}/", headers=SECRET, timeout=scaled(5))
        server.shutdown()
    assert answer.ok
    assert heard == ["Bearer secret"]
