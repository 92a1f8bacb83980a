"""A private local Ray: on loopback, with its own token, in a folder of this user; leaves nothing behind."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import secrets
import shutil
import signal
import stat
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

from jobs.cluster.listener import Listener, checked_session, find_listener
from jobs.stops import held
from orchestrator.errors import CapacityError

START_S = 90.0
START_TRIES = 3
PATIENCE_S = 3.0
GONE_S = 15.0
OBJECT_STORE_BYTES = 1_000_000_000
# Every process of a cluster inherits this variable with the cluster's folder as its value.
MARK = "RLHF_LOCAL_RAY"
PREFIX, LOCK, TOKEN, RAY = "rlhf-", "lock", "token", "ray"
# Ray's Unix sockets are below its folder: rlhf-xxxxxxxx/ray/session_2026-01-31_23-59-59_999999_4194304/sockets/
# plasma_store, and a path may have 107 bytes.
LONGEST_TEMPORARY = 107 - len("/rlhf-xxxxxxxx/ray/session_2026-01-31_23-59-59_999999_4194304/sockets/plasma_store")
# The client server would be one more service that runs any code for holders of the token, and it is not used here.
_RAY_WITHOUT_CLIENT_SERVER = """
from ray.scripts import scripts
scripts.get_ray_client_dependency_error = lambda: "not wanted"
scripts.main()
"""
_ANNOUNCED = re.compile(r"RAY_API_SERVER_ADDRESS='(?P<url>http://127\.0\.0\.1:(?P<port>\d+))'")

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class LocalRay:
    """A running cluster: control service at `address`, dashboard and Jobs API at `url`, both for holders of `token`.

    It writes only below `folder`, which only this user can enter. `listener` serves `url`.
    """

    address: str
    url: str
    token: str
    folder: Path
    listener: Listener

    @property
    def token_file(self) -> Path:
        return self.folder / TOKEN

    @property
    def logs(self) -> Path:
        return self.folder / RAY / "session_latest" / "logs"

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a process that joins."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_file)}


@contextmanager
def local_ray(*, num_cpus: int | None = None) -> Iterator[LocalRay]:
    """Starts a head node; at the end kills all its descendants and removes its folder.

    If this process is killed, its head dies with it, the head's reaper ends Ray's processes, and a job ends when it
    notices that its cluster is gone. The next local Ray of this user removes the folder.

    Args:
        num_cpus: number of cores that the node offers; None: all.

    Raises:
        CapacityError: it does not start.
    """
    # Orphaned processes become children of this one, so that none escapes.
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = _without_proxy()
    parent = _temporary()
    remove_leftovers(parent)
    with private_folder(parent) as folder:
        try:
            yield _start(folder, num_cpus)
        finally:
            with held():
                kill_marked(folder)


@contextmanager
def private_folder(parent: Path) -> Iterator[Path]:
    """A new folder that only this user can enter, locked while it is used; removed at the end."""
    with held():
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        # It gets its name only after it is locked, or another process could remove it as a leftover.
        lock = (folder / f"{LOCK}.new").open("wb")
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / f"{LOCK}.new").rename(folder / LOCK)
    try:
        yield folder
    finally:
        with held():
            shutil.rmtree(folder, ignore_errors=True)
            lock.close()


def remove_leftovers(parent: Path) -> None:
    """Removes the folders of killed launchers of this user, whose locks no process holds."""
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            about = folder.lstat()
            if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid():
                continue
            with (folder / LOCK).open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)


def kill_marked(folder: Path) -> None:
    """Ends all processes of the cluster in `folder`.

    Raises:
        CapacityError: some are still alive after GONE_S.
    """
    deadline = monotonic() + GONE_S
    patient_until = monotonic() + PATIENCE_S
    known: set[psutil.Process] = set()
    while left := _alive(known := known | _family(folder)):
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                # On SIGTERM a head first waits half a minute for its node to drain.
                is_head = "--head" in process.cmdline()
                process.send_signal(signal.SIGTERM if monotonic() < patient_until and not is_head else signal.SIGKILL)
        psutil.wait_procs(left, timeout=0.5)
        if monotonic() > deadline:
            raise CapacityError(f"processes of the local Ray are still alive: {left}. Kill them manually.")
    for process in known:
        # A zombie may have running threads: a dashboard agent's compute for a minute.
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _family(folder: Path) -> set[psutil.Process]:
    """The marked processes among this one's descendants, and their descendants: a process that sets its title loses its
    environment."""
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
    """The cluster that a process belongs to; None for zombies."""
    try:
        environment: dict[str, str] = process.environ()
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return None
    return environment.get(MARK)


def _start(folder: Path, num_cpus: int | None) -> LocalRay:
    said = ""
    for attempt in range(START_TRIES):
        ray_folder = folder / RAY
        shutil.rmtree(ray_folder, ignore_errors=True)
        ray_folder.mkdir(mode=0o700)
        # A token that a failed try may have revealed is useless in the next try.
        token = _new_token(folder / TOKEN)
        log = folder / f"start-{attempt}.log"
        with held():
            head = _launch(folder, log, num_cpus)
        if ray := _answers(folder, token, head, log):
            return ray
        said = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
        kill_marked(folder)
        head.wait(GONE_S)
    raise CapacityError(f"a local Ray did not start in {START_TRIES} tries; the last one said:\n{said}")


def _new_token(path: Path) -> str:
    token = secrets.token_hex(32)
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
        file.write(token)
    return token


def _launch(folder: Path, log: Path, num_cpus: int | None) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            _command(folder / RAY, num_cpus),
            env=_environment(folder),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=_die_with_parent,  # noqa: PLW1509  this process has no threads of Python yet
        )


def _die_with_parent() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        _libc.prctl(option, value, 0, 0, 0)


def _command(ray_folder: Path, num_cpus: int | None) -> list[str]:
    # With port 0 a service binds a port before it announces it, so no other process can take an announced port.
    return [
        sys.executable, "-c", _RAY_WITHOUT_CLIENT_SERVER, "start", "--head", "--block",
        "--temp-dir", str(ray_folder), "--port", "0",
        "--dashboard-host", "127.0.0.1", "--dashboard-port", "0", "--dashboard-agent-listen-port", "0",
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
        "RAY_AUTH_TOKEN_PATH": str(folder / TOKEN),
        # Ray replaces 127.0.0.1 by the machine's outward address and listens on all interfaces, unless it thinks that
        # it is on an operating system without clusters.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        # No such ports: any user could read them, and two clusters on one machine would conflict over the default ones.
        "AUTOSCALER_METRIC_PORT": "-1",
        "DASHBOARD_METRIC_PORT": "-1",
    }


def _answers(folder: Path, token: str, head: subprocess.Popen[bytes], log: Path) -> LocalRay | None:
    """The cluster, once its Jobs API answers; None: START_S have passed, or the head has given up."""
    deadline = monotonic() + START_S
    while monotonic() < deadline and head.poll() is None:
        # The contents of Ray's folder can be trusted; the token is sent to a port only after its owner is known.
        announced = _ANNOUNCED.search(log.read_text(errors="replace"))
        listener = find_listener(_family(folder), int(announced["port"])) if announced else None
        if announced and listener:
            address = (folder / RAY / "ray_current_cluster").read_text(encoding="utf-8").strip()
            ray = LocalRay(address, announced["url"], token, folder, listener)
            with contextlib.suppress(requests.RequestException), checked_session(listener) as session:
                answer = session.get(f"{ray.url}/api/jobs/", headers={"Authorization": f"Bearer {token}"}, timeout=5)
                if answer.ok:
                    return ray
        sleep(0.2)
    return None


def _without_proxy() -> str:
    """The hosts that need no proxy, and this machine."""
    named = os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")
    return ",".join([*filter(None, named.split(",")), "127.0.0.1", "localhost"])


def _temporary() -> Path:
    """A folder for temporary files whose path is short enough.

    Raises:
        CapacityError: none can be written.
    """
    named = [os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP")]
    tried = [*filter(None, named), "/tmp", "/var/tmp"]
    for folder in map(Path, tried):
        if len(os.fsencode(folder.absolute())) <= LONGEST_TEMPORARY and os.access(folder, os.W_OK | os.X_OK):
            return folder.absolute()
    raise CapacityError(
        f"no local Ray can start: none of {', '.join(tried)} is a folder that can be written and whose path has "
        f"at most {LONGEST_TEMPORARY} bytes, because Ray's sockets lie below it. Set TMPDIR to such a folder."
    )
