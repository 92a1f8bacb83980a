"""Another user of this machine has no access to a private local Ray or a run.

    python -m tests.ray_local.other_user FOLDER RUN_FOLDER      as root, while a local Ray runs (/tmp/rlhf-...)

Prints each attack and its result. Exit code 1 if any succeeded.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from jobs.cluster.local_ray import MARK

STRANGER = "rlhf-stranger"
LIMIT_S, TIMED_OUT = 60, 124
Environment = Mapping[str, str]
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
# /, health checks and /metrics need no token; they contain no text of a run.
GUARDED_PATHS = (
    ("GET", "/api/jobs/"),
    ("POST", "/api/jobs/"),
    ("GET", "/api/version"),
    ("GET", "/nodes?view=summary"),
    ("GET", "/logical/actors"),
    ("GET", "/api/v0/actors"),
    ("GET", "/api/v0/logs"),
    ("GET", "/api/cluster_status"),
    ("GET", "/api/job_agent/jobs/"),
    ("POST", "/api/job_agent/jobs/"),
    ("GET", "/logs/"),
    ("POST", "/get_or_create_runtime_env"),
)
# Both print [attack, success, answer] per line; arguments: ports.
ASK_HTTP = f"""
import http.client, json, sys
def ask(port, method, path, headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request(method, path, body='{{"entrypoint": "id"}}' if method == "POST" else None, headers=headers)
    answer = connection.getresponse()
    text = answer.read(200)
    is_metrics = text.startswith((b"# HELP", b"# TYPE"))  # whatever the path
    had = answer.status < 400 and not is_metrics
    return had, f"HTTP {{answer.status}} {{'metrics: numbers, no text of a run' if is_metrics else text[:60]}}"
plain = {{"Content-Type": "application/json"}}
calls = [(*call, plain) for call in {GUARDED_PATHS!r}]
calls.append(("GET", "/api/jobs/", {{**plain, "Authorization": "Bearer " + "0" * 64}}))
for port in map(int, sys.argv[1:]):
    for method, path, headers in calls:
        try:
            had, answer = ask(port, method, path, headers)
        except http.client.BadStatusLine:
            print(json.dumps([f"port {{port}}: HTTP", False, "speaks no HTTP"]), flush=True)
            break
        except (OSError, http.client.HTTPException) as error:
            had, answer = False, repr(error)
        wrong = " with a wrong token" if "Authorization" in headers else ""
        print(json.dumps([f"port {{port}}: {{method}} {{path}}{{wrong}}", had, answer]), flush=True)
"""
GRPC_METHODS = (
    "NodeInfoGcsService/GetAllNodeInfo",
    "InternalKVGcsService/InternalKVKeys",
    "JobInfoGcsService/GetAllJobInfo",
    "ActorInfoGcsService/GetAllActorInfo",
    "NodeManagerService/GetNodeStats",
    "NodeManagerService/RequestWorkerLease",
    "NodeManagerService/ShutdownRaylet",
    "ObjectManagerService/Pull",
    "CoreWorkerService/PushTask",
    "CoreWorkerService/GetCoreWorkerStats",
    "CoreWorkerService/KillActor",
    "ReporterService/GetTraceback",
    "LogService/ListLogs",
    "RayletDriver/Init",
)
ASK_GRPC = f"""
import grpc, json, sys
for port in sys.argv[1:]:
    with grpc.insecure_channel(f"127.0.0.1:{{port}}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        for name in {GRPC_METHODS!r}:
            try:
                answer = channel.unary_unary(f"/ray.rpc.{{name}}")(b"", timeout=2)
                had, text = True, f"answered {{len(answer)}} bytes"
            except grpc.RpcError as error:
                had, text = False, f"{{error.code().name}} {{error.details()}}"[:100]
            print(json.dumps([f"port {{port}}: {{name}}", had, text]), flush=True)
            if "UNAVAILABLE" in text or "DEADLINE" in text:
                break  # speaks no gRPC
"""
CONNECT = 'socket(S, PF_UNIX, SOCK_STREAM, 0); connect(S, sockaddr_un($ARGV[0])) or die "$!\\n"; print "connected"'
JOIN = """
import sys, ray
ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
print(ray.nodes())
"""


@dataclass(frozen=True)
class Tried:
    what: str
    was_had: bool
    answer: str

    def __str__(self) -> str:
        return f"{'HAD    ' if self.was_had else 'nothing'}  {self.what:44}  {self.answer}"


@dataclass(frozen=True)
class Socket:
    port: int
    address: str
    owner: str


def everything(folder: Path, run: Path) -> Iterator[Tried]:
    """Runs all attacks as STRANGER against the local Ray in `folder` and the run in `run`."""
    user = _stranger()
    yield from _files(user, folder, run)
    yield from _secrets(user, folder)
    sockets = listening(folder)
    for socket in sockets:
        is_loopback = socket.address in LOOPBACK
        yield Tried(f"port {socket.port} of {socket.owner}", not is_loopback, f"listens on {socket.address}")
    ports = [str(socket.port) for socket in sockets]
    for script in (ASK_HTTP, ASK_GRPC):
        done = _run(user, [sys.executable, "-c", script, *ports])
        for line in done.stdout.splitlines():
            yield Tried(*json.loads(line))
        if done.returncode:
            raise RuntimeError(done.stderr)
    control = (folder / "ray" / "ray_current_cluster").read_text(encoding="utf-8").strip()
    for mode in ("disabled", "token"):
        environment = {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": "0" * 64, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
        done = _run(user, [sys.executable, "-c", JOIN, control], environment)
        yield _told(f"join as a driver, authentication {mode}", done)


def listening(folder: Path) -> list[Socket]:
    """All listening TCP and UDP sockets of the local Ray in `folder` and of its jobs."""
    found = set()
    for process in _family(folder):
        with suppress(psutil.Error):
            for connection in process.net_connections(kind="inet"):
                if connection.laddr and connection.status in (psutil.CONN_LISTEN, psutil.CONN_NONE):
                    found.add(Socket(connection.laddr.port, connection.laddr.ip, _title(process)))
    return sorted(found, key=lambda socket: socket.port)


def _files(user: pwd.struct_passwd, folder: Path, run: Path) -> Iterator[Tried]:
    session = folder / "ray" / "session_latest"
    commands: dict[str, Sequence[str]] = {
        "temporary folder": ["ls", str(folder)],
        "token": ["cat", str(folder / "token")],
        "a file beside the token": ["touch", str(folder / "planted")],
        "sessions": ["ls", str(folder / "ray") + "/"],
        "logs": ["ls", str(session / "logs") + "/"],
        "log of the head": ["cat", str(folder / "start-0.log")],
        "sockets": ["ls", str(session / "sockets") + "/"],
        "object store through its socket": [
            "perl",
            "-MSocket",
            "-e",
            CONNECT,
            str(session / "sockets" / "plasma_store"),
        ],
        "object store in /dev/shm": ["sh", "-c", "find /dev/shm -readable -name 'plasma*' | grep ."],
        "run folder": ["ls", str(run) + "/"],
        "config of the run": ["cat", str(run / "config.yaml")],
        "log of the run": ["ls", str(run / "log") + "/"],
        "checkpoints of the run": ["ls", str(run / "checkpoints") + "/"],
        "a pause of the run": ["touch", str(run / "PAUSED")],
    }
    for what, command in commands.items():
        yield _tried(user, what, command)


def _secrets(user: pwd.struct_passwd, folder: Path) -> Iterator[Tried]:
    token = (folder / "token").read_text(encoding="ascii")
    family = _family(folder)
    for process in family[:1]:
        yield _tried(user, f"environment of {_title(process)}", ["cat", f"/proc/{process.pid}/environ"])
        yield _tried(user, f"memory of {_title(process)}", ["head", "-c", "1", f"/proc/{process.pid}/mem"])
    told = [process for process in psutil.process_iter(["cmdline"]) if token in " ".join(process.info["cmdline"] or ())]
    yield Tried("token on a command line", bool(told), f"looked at {len(psutil.pids())} processes")
    kept = Path.home() / ".ray" / "auth_token"
    is_ours = kept.exists() and kept.read_text(encoding="utf-8").strip() == token
    yield Tried("token in Ray's own ~/.ray/auth_token", is_ours, "another token" if kept.exists() else "no such file")


def _tried(user: pwd.struct_passwd, what: str, command: Sequence[str]) -> Tried:
    return _told(what, _run(user, command))


def _told(what: str, done: subprocess.CompletedProcess[str]) -> Tried:
    """Any standard output, or exit code 0, counts as success of the attack."""
    if done.returncode == TIMED_OUT and not done.stdout:
        return Tried(what, False, f"no answer within {LIMIT_S} s")
    lines = (done.stdout or done.stderr).strip().splitlines() or [f"exit code {done.returncode}"]
    return Tried(what, bool(done.stdout) or done.returncode == 0, re.sub(r"\s+", " ", lines[-1])[:110])


def _run(
    user: pwd.struct_passwd, command: Sequence[str], environment: Environment | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs as `user`. It may read any file, because only root may have access to Python; it reads none of the run's."""
    reads = ("--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search")
    ids = ("--reuid", str(user.pw_uid), "--regid", str(user.pw_gid), "--clear-groups")
    is_python = command[0] == sys.executable
    return subprocess.run(
        ["timeout", str(LIMIT_S), "setpriv", *ids, *(reads if is_python else ()), *command],
        cwd="/",
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )


def _family(folder: Path) -> list[psutil.Process]:
    marked: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == str(folder):
                for one in (process, *process.children(recursive=True)):
                    marked.setdefault(one.pid, one)
    return [marked[pid] for pid in sorted(marked)]


def _title(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        parts = [part for part in process.cmdline() if part.endswith(".py") or part.startswith(("ray::", "jobs."))]
        return Path(parts[0]).name if parts else process.name()
    return "a process"


def _stranger() -> pwd.struct_passwd:
    with suppress(KeyError):
        return pwd.getpwnam(STRANGER)
    subprocess.run(["useradd", "--system", "--no-create-home", STRANGER], check=True)
    return pwd.getpwnam(STRANGER)


def main(folder: str, run: str) -> int:
    print(f"as {STRANGER}, uid {_stranger().pw_uid}, against {folder} and {run}:")  # noqa: T201
    had = 0
    for tried in everything(Path(folder), Path(run)):
        print(tried, flush=True)  # noqa: T201
        had += tried.was_had
    return int(had > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
