"""The launcher's Ray: reachable only locally and with its token; jobs return their exit code; nothing remains."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep

import psutil
import pytest
import requests

from jobs.cluster.jobs_api import Job, connect, connect_local, follow, submit
from jobs.cluster.local_ray import MARK, LocalRay, local_ray
from jobs.cluster.staging import stage_project
from jobs.stops import INTERRUPTED, STOPPED
from orchestrator.config.config import Config
from orchestrator.errors import CapacityError, ConfigError
from orchestrator.run.folder import open_run
from tests.deadlines import scaled
from tests.ray_local.other_user import LOOPBACK, everything, listening

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[2]
COMMITS_WHEN_STOPPED = """
import signal, sys, time
def commit(*_):
    time.sleep(5)
    print("committed", flush=True)
    sys.exit(1)
signal.signal(signal.SIGTERM, commit)
print("started", flush=True)
time.sleep(120)
"""


HOLDS = """
import os, time, typer
from jobs.command import run_command
from jobs.cluster.local_ray import local_ray
def work():
    print("starting", flush=True)
    with local_ray(num_cpus=1) as ray:
        print(ray.folder, flush=True)
        time.sleep(300)
typer.run(lambda: run_command(work))
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalRay]:
    others = psutil.Process().children(recursive=True)  # from earlier tests
    with local_ray(num_cpus=1) as ray:
        yield ray
        family = psutil.Process().children(recursive=True)
    assert processes_of(ray.folder) == []
    assert still_there([process for process in family if process not in others]) == []
    assert not ray.folder.exists()


def processes_of(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == str(folder):
                found.append(process)
    return found


def still_there(family: list[psutil.Process]) -> list[psutil.Process]:
    """Live processes of a family. Ray's agents and actors set their titles, which removes their marks."""
    found = []
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def run_job(cluster: LocalRay, job: Job) -> tuple[int, str]:
    written: list[str] = []
    client = connect_local(cluster)
    code = asyncio.run(follow(client, submit(client, job), written.append))
    return code, "".join(written)


def python(code: str) -> str:
    return "exec " + shlex.join([sys.executable, "-c", code])


def test_everything_listens_on_loopback_only(cluster: LocalRay) -> None:
    sockets = listening(cluster.folder)
    assert int(cluster.url.rsplit(":", 1)[1]) in {socket.port for socket in sockets}
    assert {socket.address for socket in sockets} <= LOOPBACK


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_of_the_machine_gets_nothing(cluster: LocalRay) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as root:
        Path(root).chmod(0o755)
        run = open_run(
            Config.model_validate({"reward": {"path": "/models/reward"}, "run": {"root": root, "id": "demo"}})
        ).path
        for name in ("log", "checkpoints"):
            (run / name).mkdir()
        submit(connect_local(cluster), Job("sleep 60"))
        tried = list(everything(cluster.folder, run))
    assert len(tried) > 150
    assert [str(one) for one in tried if one.was_had] == []


def test_who_has_no_token_gets_nothing(cluster: LocalRay) -> None:
    assert requests.get(f"{cluster.url}/api/jobs/", timeout=scaled(10)).status_code == 401
    assert cluster.token_file.stat().st_mode & 0o077 == 0
    with pytest.raises(ConfigError, match="RAY_AUTH_TOKEN_PATH"):
        connect(cluster.url, token="0" * 64)


@pytest.mark.parametrize("code", [0, 2, 3])
def test_exit_code_and_lines_of_the_job_are_told(cluster: LocalRay, code: int) -> None:
    told, text = run_job(cluster, Job(python(f"print('line one'); print('line two'); raise SystemExit({code})")))
    assert told == code
    assert text.splitlines()[-2:] == ["line one", "line two"]


def test_job_that_is_killed_counts_as_failed(cluster: LocalRay) -> None:
    told, _ = run_job(cluster, Job(python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")))
    assert told == 128 + signal.SIGKILL


def test_staged_project_is_what_a_job_sees(cluster: LocalRay, tmp_path: Path) -> None:
    stage, extra = tmp_path / "stage", tmp_path / "prompts.jsonl"
    stage.mkdir()
    extra.write_text("{}\n", encoding="utf-8")
    stage_project(ROOT, stage, [extra])
    lists = "import os, orchestrator; print(sorted(os.listdir('.')), orchestrator.__file__)"
    told, text = run_job(cluster, Job(f"python -c {shlex.quote(lists)}", working_dir=stage))
    assert told == 0
    assert "'prompts.jsonl'" in text
    assert "'tests'" not in text
    assert "working_dir_files" in text.split("]")[-1]


def test_job_whose_follower_is_stopped_has_time_to_commit(cluster: LocalRay) -> None:
    written: list[str] = []
    started = asyncio.Event()

    def write(text: str) -> None:
        written.append(text)
        if "started" in "".join(written):
            started.set()

    async def stopped_when_started() -> None:
        client = connect_local(cluster)
        job_id = submit(client, Job(python(COMMITS_WHEN_STOPPED)))
        task = asyncio.create_task(follow(client, job_id, write))
        await asyncio.wait_for(started.wait(), scaled(60))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await asyncio.to_thread(client.get_job_info, job_id)).status.is_terminal()

    asyncio.run(stopped_when_started())
    assert "committed" in "".join(written)


def test_address_where_nothing_answers_is_told_in_seconds() -> None:
    started = monotonic()
    with pytest.raises(CapacityError, match="no Ray Jobs API answers at http://127.0.0.1:9"):
        connect("http://127.0.0.1:9")
    assert monotonic() - started < scaled(15)


def test_rays_processes_end_when_the_launcher_is_killed() -> None:
    holds = """
import time
from jobs.cluster.local_ray import local_ray
with local_ray() as ray:
    print(ray.folder, flush=True)
    time.sleep(300)
"""
    with subprocess.Popen([sys.executable, "-c", holds], cwd=ROOT, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        folder = Path(launcher.stdout.readline().strip())
        family = psutil.Process(launcher.pid).children(recursive=True)
        assert processes_of(folder)
        os.kill(launcher.pid, signal.SIGKILL)
    deadline = monotonic() + scaled(120)
    while still_there(family) and monotonic() < deadline:
        sleep(0.5)
    shutil.rmtree(folder)
    assert still_there(family) == []


@pytest.mark.parametrize(("number", "phase"), [(signal.SIGHUP, "up"), (signal.SIGTERM, "starting")])
def test_a_launcher_that_is_told_to_stop_leaves_no_folder_and_no_process(number: signal.Signals, phase: str) -> None:
    """A private Ray needs neither a home folder nor a working proxy."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="t") as temporary:
        environment = {**os.environ, "TMPDIR": temporary, "http_proxy": "http://127.0.0.1:9", "HOME": "/nonexistent"}
        command = [sys.executable, "-c", HOLDS]
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as launcher:
            assert launcher.stdout is not None
            assert launcher.stdout.readline() == "starting\n"
            if phase == "up":
                assert Path(launcher.stdout.readline().strip()).parent == Path(temporary)
            else:
                while not list(Path(temporary).glob("rlhf-*/ray/session_latest")):
                    assert launcher.poll() is None
                    sleep(0.1)
            family = psutil.Process(launcher.pid).children(recursive=True)
            assert family
            launcher.send_signal(number)
            _, err = launcher.communicate(timeout=scaled(60))
        assert (launcher.returncode, err) == (INTERRUPTED, f"{STOPPED}\n")
        assert list(Path(temporary).glob("rlhf-*")) == []
        assert still_there(family) == []


def test_a_command_without_an_address_has_a_private_ray_and_joins_no_other(cluster: LocalRay) -> None:
    """Also while another Ray runs, and without a home folder."""
    joins = """
import ray
from jobs.cluster.connection import cluster
with cluster(None, wait_s=20.0, tell=print):
    print(ray.get_runtime_context().gcs_address, ray.get(ray.remote(lambda: 42).remote()))
print(ray.is_initialized())
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", joins],
        cwd=ROOT,
        env={**environment, "HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        timeout=scaled(120),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    _, joined, is_initialized = done.stdout.splitlines()
    address, answer = joined.split()
    assert (answer, is_initialized) == ("42", "False")
    assert address.startswith("127.0.0.1:")
    assert address != cluster.address
