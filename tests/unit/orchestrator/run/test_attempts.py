"""Two attempts never write one run: a new one starts after the previous one is dead, and of several only one starts."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.errors import CapacityError
from orchestrator.run import attempts
from orchestrator.run.attempts import claim
from tests.deadlines import scaled

ROOT = Path(__file__).resolve().parents[4]
CLAIMS_AND_STAYS = """
import sys, time
from pathlib import Path
from orchestrator.run.attempts import claim
from orchestrator.errors import CapacityError
try:
    print(claim(Path(sys.argv[1]), wait_s=0.0, tell=lambda line: None), flush=True)
except CapacityError as error:
    print("refused:", error, flush=True)
    sys.exit()
time.sleep(60)
"""
HERE = {"host": socket.gethostname(), "machine": attempts._machine()}
ELSEWHERE = {"host": "node-7", "machine": "another boot pid:[1]", "pid": 77, "started": 1.7e9}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "demo" / "attempts").mkdir(parents=True)
    return tmp_path / "demo"


@pytest.fixture
def begin(run: Path) -> Iterator[Any]:
    """Starts a process that claims an attempt and stays."""
    begun: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", CLAIMS_AND_STAYS, str(run)]
        begun.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        return begun[-1]

    yield start
    for process in begun:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def claimed(run: Path, wait_s: float = 0.0) -> int:
    return claim(run, wait_s=wait_s, tell=lambda line: None)


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def write(run: Path, attempt: int, owner: object) -> None:
    (run / "attempts" / f"{attempt:03d}").write_text(json.dumps(owner), encoding="utf-8")


def beat(run: Path, attempt: int, beats: int, ended: str | None = None) -> None:
    content = json.dumps({"attempt": attempt, "time": beats, "ended": ended})
    (run / "heartbeat.json").write_text(content, encoding="utf-8")


@pytest.fixture
def silent_s(monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(attempts, "SILENT_S", 0.5)
    monkeypatch.setattr(attempts, "_POLL_S", 0.05)
    return 0.5


def test_a_live_attempt_is_not_superseded_and_a_killed_one_is_at_once(run: Path, begin: Any) -> None:
    first = begin()
    assert first_line(first) == "1"
    with pytest.raises(CapacityError, match=f"attempt 1 .process {first.pid} on .*, which is alive"):
        claimed(run)
    assert [path.name for path in (run / "attempts").iterdir()] == ["001"]
    first.kill()  # but not reaped: a zombie is dead
    deadline = time.monotonic() + scaled(10)
    while psutil.Process(first.pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)
    assert claimed(run) == 2


def test_an_attempt_that_ends_while_it_is_waited_for_is_followed(run: Path, begin: Any) -> None:
    first = begin()
    assert first_line(first) == "1"
    told: list[str] = []
    threading.Timer(1.0, first.kill).start()
    assert claim(run, wait_s=30.0, tell=told.append) == 2
    assert len(told) == 1
    assert f"attempt 1 of this run (process {first.pid} on" in told[0]


def test_of_several_that_start_at_once_one_begins(run: Path, begin: Any) -> None:
    lines = [first_line(process) for process in [begin() for _ in range(4)]]
    assert sorted(line.split(":")[0] for line in lines) == ["1", "refused", "refused", "refused"]
    assert [path.name for path in (run / "attempts").iterdir()] == ["001"]


def test_an_attempt_that_said_that_it_ended_is_followed_at_once(run: Path) -> None:
    write(run, 1, ELSEWHERE)
    beat(run, 1, 0, "stopped")
    started = time.monotonic()
    assert claimed(run) == 2
    assert time.monotonic() - started < scaled(5)


def test_an_attempt_on_another_machine_lives_while_its_heartbeat_changes(run: Path, silent_s: float) -> None:
    write(run, 1, ELSEWHERE)
    done = threading.Event()

    def heart() -> None:
        count = 0
        while not done.wait(0.1):
            beat(run, 1, count := count + 1)

    beating = threading.Thread(target=heart)
    beating.start()
    try:
        with pytest.raises(CapacityError, match="process 77 on node-7"):
            claimed(run, wait_s=2 * silent_s)
    finally:
        done.set()
        beating.join()


@pytest.mark.parametrize("owner", [ELSEWHERE, None, {}, {"pid": 1}, [1], {**ELSEWHERE, "pid": "x"}])
def test_a_lost_node_is_replaced_once_its_heartbeat_is_silent(run: Path, owner: object, silent_s: float) -> None:
    write(run, 1, owner)
    beat(run, 1, 5)
    started = time.monotonic()
    assert claimed(run) == 2
    assert time.monotonic() - started >= silent_s


def test_an_empty_file_of_an_earlier_version_and_foreign_files_do_no_harm(run: Path, silent_s: float) -> None:
    assert silent_s
    (run / "attempts" / "001").touch()
    (run / "attempts" / ".DS_Store").touch()
    assert claimed(run) == 2


def test_a_process_id_that_was_given_to_another_process_is_no_life_sign(run: Path) -> None:
    write(run, 1, {**HERE, "pid": os.getppid(), "started": 1.0})
    assert claimed(run) == 2
