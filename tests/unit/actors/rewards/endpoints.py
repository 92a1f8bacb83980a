"""Servers on loopback for tests of what asks endpoints."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Endpoint(ThreadingHTTPServer):
    """Answers from a list of (status, body); repeats the last. Records requests."""

    daemon_threads = True

    def __init__(self, answers: list[tuple[int, Any]], delay_s: float = 0.0) -> None:
        self.answers, self.delay_s = answers, delay_s
        self.asked: list[Any] = []
        self.authorizations: list[str | None] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/score"


class _Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(json.loads(body))
        self.server.authorizations.append(self.headers["Authorization"])
        status, answer = self.server.answers[min(len(self.server.asked), len(self.server.answers)) - 1]
        time.sleep(self.server.delay_s)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(answer if isinstance(answer, bytes) else json.dumps(answer).encode())

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def endpoints() -> Iterator[Callable[..., Endpoint]]:
    """A function that starts an Endpoint; all of them end with the context."""
    servers: list[Endpoint] = []

    def start(*answers: tuple[int, Any], delay_s: float = 0.0) -> Endpoint:
        servers.append(Endpoint(list(answers), delay_s))
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


class Raw:
    """Accepts one request per connection and sends these bytes, with a pause before each, then closes or waits."""

    def __init__(self, chunks: Iterator[bytes], *, pause_s: float = 0.0, reads: bool = True) -> None:
        self._chunks, self._pause_s, self._reads = chunks, pause_s, reads
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.num_requests = 0
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/score"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            self.num_requests += 1
            with connection:
                if not self._reads:  # the kernel resets connections with unread data
                    continue
                connection.recv(1 << 20)
                try:
                    for chunk in self._chunks:
                        time.sleep(self._pause_s)
                        connection.sendall(chunk)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(1 << 20):  # closing with unread bytes would lose the answer
                        pass
                except OSError:
                    continue


def answered(body: bytes, *headers: str) -> Iterator[bytes]:
    head = ["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *headers]
    return iter(["\r\n".join(head).encode() + b"\r\n\r\n" + body])


def for_ever(head: bytes, item: bytes) -> Iterator[bytes]:
    yield head
    while True:
        yield item


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
