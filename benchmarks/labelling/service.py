"""A labelling service in a process of its own, and a PostgreSQL server for it (Debian's package postgresql)."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[2]
POSTGRESQL = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))


@contextmanager
def service(place: str, port: int, *options: str) -> Iterator[subprocess.Popen[str]]:
    """`rlhf label serve` with these options; it may not answer yet. It is killed at the end.

    Args:
        port: 0 takes any free one.
    """
    command = [sys.executable, "-m", "jobs", "label", "serve", "--store", place, "--port", str(port), *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def address_of(process: subprocess.Popen[str]) -> str:
    """The address that the service printed at its start."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if found := re.search(r"labelling .* at (http://\S+)", line):
            return found[1]
    raise RuntimeError(f"the service has ended: {''.join(seen)}")


def until_healthy(address: str, process: subprocess.Popen[str], *, limit_s: float = 60.0) -> None:
    """Raises RuntimeError, with the output of the service, if it does not answer in time."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(httpx.HTTPError):
            if httpx.get(f"{address}/healthz").status_code == httpx.codes.OK:
                return
        time.sleep(0.1)
    process.kill()
    raise RuntimeError(f"the service does not answer: {process.communicate()[0]}")


@contextmanager
def postgresql(*, limit_s: float = 60.0) -> Iterator[str]:
    """URL of a new server in a folder of its own, at a socket there. PostgreSQL refuses to run as root."""
    folder = Path(tempfile.mkdtemp(prefix="labels-"))
    as_user: list[str] = []
    if os.geteuid() == 0:
        owner = pwd.getpwnam("postgres")
        os.chown(folder, owner.pw_uid, owner.pw_gid)
        as_user = ["runuser", "-u", "postgres", "--"]
    programs = POSTGRESQL[-1].parent

    def run(*command: str) -> None:
        # Its output goes to a file: the server would keep a pipe open.
        with (folder / "output").open("w") as output:
            subprocess.run([*as_user, *command], check=True, cwd=folder, timeout=limit_s, stdout=output, stderr=output)

    data = str(folder / "data")
    try:
        run(str(programs / "initdb"), "-D", data, "-U", "labels", "-A", "trust", "--no-sync")
        settings = f"-k {folder} -c listen_addresses=''"
        run(str(programs / "pg_ctl"), "-D", data, "-w", "-l", str(folder / "log"), "-o", settings, "start")
        try:
            yield f"postgresql+psycopg://labels@/postgres?host={folder}"
        finally:
            run(str(programs / "pg_ctl"), "-D", data, "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
