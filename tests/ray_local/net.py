"""Three hosts on one machine: network namespaces on a bridge, with one Ray node in each.

Each node has separate networks, processes and mounts, so all can use the same ports. Names of namespaces contain the
id of this process; namespaces are always removed at the end.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.deadlines import scaled

VENV = Path(sys.executable).parent
SUBNET = "10.77.0"
DASHBOARD = f"http://{SUBNET}.1:8265"
START_S = scaled(90.0)
GONE_S = scaled(20.0)
COMMAND_S = scaled(30.0)
OBJECT_STORE_BYTES = 80_000_000

_FETCH = (
    "import sys, urllib.request as r\n"
    "q = r.Request(sys.argv[1], headers={'Authorization': 'Bearer ' + sys.argv[2]} if sys.argv[2] else {})\n"
    "sys.stdout.write(r.urlopen(q, timeout=10).read().decode())"
)


def why_not() -> str | None:
    """What this machine lacks. None: nothing."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux, to make network namespaces"
    missing = [tool for tool in ("ip", "unshare") if shutil.which(tool) is None]
    if missing:
        return f"needs {' and '.join(missing)} (Debian's packages iproute2 and util-linux)"
    probe = f"rlhf{os.getpid()}-probe"
    made = _run("ip", "netns", "add", probe)
    _run("ip", "netns", "del", probe)
    return f"may not make network namespaces: {made.stderr.strip()}" if made.returncode else None


@dataclass(frozen=True)
class Host:
    """A namespace that is one host."""

    number: int
    namespace: str

    @property
    def address(self) -> str:
        return f"{SUBNET}.{self.number}"


@contextmanager
def three_hosts() -> Iterator[list[Host]]:
    prefix = f"rlhf{os.getpid()}"
    with ExitStack() as stack:
        for name in ("sw", "n1", "n2", "n3"):
            _ip("netns", "add", f"{prefix}-{name}")
            stack.callback(_ip, "netns", "del", f"{prefix}-{name}")
            _ip("-n", f"{prefix}-{name}", "link", "set", "lo", "up")
        switch = f"{prefix}-sw"
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        hosts = [Host(number, f"{prefix}-n{number}") for number in (1, 2, 3)]
        for host in hosts:
            inner, outer = f"v{host.number}", f"p{host.number}"
            _ip("link", "add", inner, "netns", host.namespace, "type", "veth", "peer", "name", outer, "netns", switch)
            _ip("-n", switch, "link", "set", outer, "master", "br0", "up")
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", inner)
            _ip("-n", host.namespace, "link", "set", inner, "up")
        yield hosts


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=COMMAND_S)


def _ip(*arguments: str) -> None:
    done = _run("ip", *arguments)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@dataclass(frozen=True)
class Cluster:
    """A running cluster with token authentication. `environment` is that of its nodes and clients."""

    head: Host
    token: str
    environment: Mapping[str, str]

    def run(self, *command: str, cwd: Path, timeout_s: float) -> subprocess.CompletedProcess[str]:
        """Runs a command on the head's host."""
        return subprocess.run(
            ["ip", "netns", "exec", self.head.namespace, *command],
            check=False,
            cwd=cwd,
            env=dict(self.environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )

    def fetch(self, path: str, *, with_token: bool = True) -> subprocess.CompletedProcess[str]:
        """A GET request to the dashboard, from the head's host."""
        command = ["ip", "netns", "exec", self.head.namespace, sys.executable, "-S", "-c", _FETCH]
        arguments = [f"{DASHBOARD}{path}", self.token if with_token else ""]
        return _run(*command, *arguments)

    def listed(self, kind: str) -> list[dict[str, Any]]:
        """The list from the state API: "nodes" or "actors"."""
        answer = self.fetch(f"/api/v0/{kind}?detail=1&limit=1000")
        if answer.returncode:
            raise ConnectionError(answer.stderr.strip().splitlines()[-1])
        rows: list[dict[str, Any]] = json.loads(answer.stdout)["data"]["result"]["result"]
        return rows


@contextmanager
def three_nodes(folder: Path, *, num_cpus: int = 2, comes_back: bool = False) -> Iterator[Cluster]:
    """Head and two workers, all alive.

    Args:
        folder: short path; gets home, token, logs and Ray's temporary folders.
        comes_back: restart a worker node that dies.
    """
    home = folder / "home"
    home.mkdir(parents=True)
    token = secrets.token_hex(32)
    (folder / "token").touch(mode=0o600)
    (folder / "token").write_text(token, encoding="utf-8")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = kept | {
        "HOME": str(home),
        "PATH": f"{VENV}:{os.environ.get('PATH', os.defpath)}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    with three_hosts() as hosts, ExitStack() as stack:
        for host in hosts:
            stack.enter_context(_node(host, folder, environment, num_cpus, comes_back and host.number > 1))
        cluster = Cluster(hosts[0], token, environment)
        _wait_for_nodes(cluster, folder, len(hosts))
        yield cluster


@contextmanager
def _node(host: Host, folder: Path, environment: Mapping[str, str], num_cpus: int, comes_back: bool) -> Iterator[None]:
    role = (
        ["--head", "--port", "6379", "--dashboard-host", host.address, "--dashboard-port", "8265"]
        if host.number == 1
        else ["--address", f"{SUBNET}.1:6379"]
    )
    command = [
        *("ip", "netns", "exec", host.namespace, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc"),
        *(str(VENV / "ray"), "start", "--block", "--disable-usage-stats", "--node-ip-address", host.address),
        *("--num-cpus", str(num_cpus), "--object-store-memory", str(OBJECT_STORE_BYTES)),
        *("--temp-dir", str(folder / f"n{host.number}"), "--metrics-export-port", "8080"),
        *("--dashboard-agent-listen-port", "52365", *role),
    ]

    def start() -> subprocess.Popen[bytes]:
        with (folder / f"n{host.number}.log").open("ab") as log:
            return subprocess.Popen(
                command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    running = [start()]
    ending = threading.Event()

    def keep() -> None:
        while not ending.is_set():
            running[0].wait()
            if not ending.is_set():
                _wait_until_empty(host)
                running[0] = start()

    keeper = threading.Thread(target=keep, daemon=True)
    if comes_back:
        keeper.start()
    try:
        yield
    finally:
        ending.set()
        running[0].kill()  # its child is the first process of its namespace; all others end with it
        running[0].wait(timeout=GONE_S)
        _wait_until_empty(host)


def _wait_until_empty(host: Host) -> None:
    deadline = time.monotonic() + GONE_S
    while left := _run("ip", "netns", "pids", host.namespace).stdout.split():
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {left} of {host.namespace} are still there after {GONE_S:.0f} s")
        time.sleep(0.1)


def _wait_for_nodes(cluster: Cluster, folder: Path, count: int) -> None:
    deadline = time.monotonic() + START_S
    problem = "nothing answered"
    while time.monotonic() < deadline:
        try:
            alive = [node for node in cluster.listed("nodes") if node["state"] == "ALIVE"]
        except (ConnectionError, subprocess.TimeoutExpired) as error:
            problem = str(error)
        else:
            if len(alive) == count:
                return
            problem = f"{len(alive)} nodes are alive"
        time.sleep(0.5)
    logs = "\n".join(path.read_text(errors="replace")[-1500:] for path in sorted(folder.glob("n*.log")))
    raise RuntimeError(f"no {count} nodes within {START_S:.0f} s: {problem}\n{logs}")
