"""A service in a process of its own."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.deadlines import scaled

ROOT = Path(__file__).resolve().parents[5]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def service(store: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    command = ["label", "serve", "--store", str(store), "--port", str(port), "--rate", "1000", "--gold-share", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs", *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def until_healthy(port: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + scaled(20)
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.05)
    process.kill()
    pytest.fail(f"the service does not answer: {process.communicate()[0]}")
