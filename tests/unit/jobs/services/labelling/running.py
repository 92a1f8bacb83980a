"""A service in a process of its own."""

from __future__ import annotations

import subprocess
from contextlib import AbstractContextManager
from pathlib import Path

from benchmarks.labelling import service as services
from tests.deadlines import scaled
from tests.ports import free_port as free_port

ROOT = Path(__file__).resolve().parents[5]


def service(store: Path, port: int, *, rate: float = 1000.0) -> AbstractContextManager[subprocess.Popen[str]]:
    return services.service(str(store), port, "--rate", str(rate), "--gold-share", "0")


def until_healthy(port: int, process: subprocess.Popen[str]) -> None:
    services.until_healthy(f"http://127.0.0.1:{port}", process, limit_s=scaled(20))
