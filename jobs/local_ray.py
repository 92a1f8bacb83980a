"""A Ray of one's own on this machine: on loopback, with a private token, gone without a trace afterwards."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

import psutil
import requests

from actors.process import free_port
from orchestrator.errors import CapacityError

START_S = 90.0
START_TRIES = 3
PATIENCE_S = 3.0
GONE_S = 15.0
OBJECT_STORE_BYTES = 1_000_000_000
# Every process of a cluster inherits this variable with the cluster's folder as its value.
MARK = "RLHF_LOCAL_RAY"
# Ray's Unix sockets lie below its folder, and their paths must stay under 107 bytes.
LONGEST_TEMPORARY = 36

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class LocalRay:
    """A running cluster: dashboard and Jobs API at `url`, for who holds `token`; `folder` has token file and logs."""

    url: str
    token: str
    folder: Path

    @property
    def token_file(self) -> Path:
        return self.folder / "token"

    @property
    def logs(self) -> Path:
        return self.folder / "session_latest" / "logs"


@contextmanager
def local_ray(*, num_cpus: int | None = None) -> Iterator[LocalRay]:
    """Starts a head node; at the end kills every process that descends from it and removes its folder.

    Should this process be killed, its head dies with it, the head's own reaper ends Ray's processes, and a job ends
    when it notices that its cluster is gone.

    Args:
        num_cpus: cores that the node offers; null: all of the machine.

    Raises:
        CapacityError: it does not start.
    """
    # Processes whose parent is gone become children of this one, so that none escapes.
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = _without_proxy()
    folder = Path(tempfile.mkdtemp(prefix="rlhf-", dir=_short_temporary()))
    token = secrets.token_hex(32)
    try:
        url, head = _start(folder, token, num_cpus)
        yield LocalRay(url, token, folder)
        kill_marked(folder)
        head.wait(GONE_S)
    finally:
        kill_marked(folder)
        shutil.rmtree(folder, ignore_errors=True)


def kill_marked(folder: Path) -> None:
    """Ends the processes of the cluster in `folder`.

    Raises:
        CapacityError: some are still there after GONE_S.
    """
    deadline = monotonic() + GONE_S
    patient_until = monotonic() + PATIENCE_S
    known: set[psutil.Process] = set()
    while left := _alive(known := known | _family(folder)):
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                # On SIGTERM a head first waits for half a minute for its node to drain.
                is_head = "start" in process.cmdline()[:4]
                process.send_signal(signal.SIGTERM if monotonic() < patient_until and not is_head else signal.SIGKILL)
        psutil.wait_procs(left, timeout=0.5)
        if monotonic() > deadline:
            raise CapacityError(f"processes of the local Ray are still there: {left}. Kill them by hand.")
    for process in known:
        # A zombie may have threads left: a dashboard agent's then compute in vain for a minute.
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _family(folder: Path) -> set[psutil.Process]:
    """The marked processes among this one's descendants, and theirs: whoever sets its title loses its environment."""
    marked = {process for process in psutil.Process().children(recursive=True) if _mark(process) == str(folder)}
    for process in list(marked):
        with contextlib.suppress(psutil.NoSuchProcess):
            marked.update(process.children(recursive=True))
    return marked


def _alive(processes: set[psutil.Process]) -> list[psutil.Process]:
    def is_alive(process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
        return False

    return list(filter(is_alive, processes))


def _mark(process: psutil.Process) -> str | None:
    """The cluster that a process belongs to; null for the dead, which only wait to be collected."""
    try:
        environment: dict[str, str] = process.environ()
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return None
    return environment.get(MARK)


def _start(folder: Path, token: str, num_cpus: int | None) -> tuple[str, subprocess.Popen[bytes]]:
    (folder / "token").touch(mode=0o600)
    (folder / "token").write_text(token, encoding="utf-8")
    for _ in range(START_TRIES):
        dashboard, client = free_port(), free_port()
        url = f"http://127.0.0.1:{dashboard}"
        with (folder / "start.log").open("wb") as log:
            head = subprocess.Popen(
                _command(folder, dashboard, client, num_cpus),
                env=_environment(folder),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_die_with_parent,  # noqa: PLW1509  this process has no threads of Python yet
            )
        if _answers(url, token, head):
            return url, head
        kill_marked(folder)
        head.wait(GONE_S)
    tail = "\n".join((folder / "start.log").read_text(errors="replace").splitlines()[-5:])
    raise CapacityError(f"a local Ray did not start in {START_TRIES} tries; the last one said:\n{tail}")


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _command(folder: Path, dashboard: int, client: int, num_cpus: int | None) -> list[str]:
    return [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block",
        "--temp-dir", str(folder), "--port", "0", "--ray-client-server-port", str(client),
        "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard), "--dashboard-agent-listen-port", "0",
        "--min-worker-port", "0", "--max-worker-port", "0",
        "--object-store-memory", str(OBJECT_STORE_BYTES), "--disable-usage-stats",
        *([] if num_cpus is None else ["--num-cpus", str(num_cpus)]),
    ]  # fmt: skip


def _environment(folder: Path) -> dict[str, str]:
    dropped = {"RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "PYTHONDONTWRITEBYTECODE"}
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return kept | {
        MARK: str(folder),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        # Ray replaces 127.0.0.1 by the machine's outward address and listens on all interfaces, unless it thinks that
        # it is on an operating system without clusters.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Fixed ports otherwise, over which two clusters on one machine would quarrel.
        "AUTOSCALER_METRIC_PORT": str(free_port()),
        "DASHBOARD_METRIC_PORT": str(free_port()),
    }


def _answers(url: str, token: str, head: subprocess.Popen[bytes]) -> bool:
    """Whether the Jobs API is up before START_S have passed or the head has given up."""
    deadline = monotonic() + START_S
    while monotonic() < deadline and head.poll() is None:
        with contextlib.suppress(requests.RequestException):
            answer = requests.get(f"{url}/api/jobs/", headers={"Authorization": f"Bearer {token}"}, timeout=5)
            if answer.ok:
                return True
        sleep(0.2)
    return False


def _without_proxy() -> str:
    """The hosts that need no proxy, and this machine."""
    named = os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")
    return ",".join([*filter(None, named.split(",")), "127.0.0.1", "localhost"])


def _short_temporary() -> str:
    folder = tempfile.gettempdir()
    return folder if len(folder) <= LONGEST_TEMPORARY else "/tmp"
