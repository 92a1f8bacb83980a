from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import RewardError
from orchestrator.watching.heartbeat import EVERY_S, HEARTBEAT_FILE, Heartbeat


class Time:
    """A clock that the test advances, with sleepers that it wakes."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._sleepers: list[asyncio.Future[None]] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        sleeper = asyncio.get_running_loop().create_future()
        self._sleepers.append(sleeper)
        await sleeper
        self.now += seconds

    async def pass_one_sleep(self) -> None:
        await asyncio.sleep(0)
        sleepers, self._sleepers = self._sleepers, []
        for sleeper in sleepers:
            sleeper.set_result(None)
        await asyncio.sleep(0)


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def make(tmp_path: Path, time: Time) -> Callable[..., Heartbeat]:
    def build(attempt: int = 1, read: Callable[[], Mapping[str, Any]] = dict) -> Heartbeat:
        return Heartbeat(tmp_path, attempt, read, wall_clock=time, sleep=time.sleep)

    return build


def content(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / HEARTBEAT_FILE).read_text())
    assert isinstance(found, dict)
    return found


async def test_it_beats_at_once_and_after_every_interval_with_what_is_going_on(make, time, tmp_path):
    going_on = {"stage": "rl", "step": 0, "phases": {"generate": 1.5}}
    async with make(read=lambda: going_on):
        assert content(tmp_path) == {
            "time": 1000.0,
            "attempt": 1,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            **going_on,
            "waiting": [],
            "paused": None,
            "people": None,
            "ended": None,
        }
        going_on["step"] = 1
        await time.pass_one_sleep()
        assert content(tmp_path)["step"] == 1
        assert content(tmp_path)["time"] == 1000.0 + EVERY_S
        await time.pass_one_sleep()
        assert content(tmp_path)["time"] == 1000.0 + 2 * EVERY_S
    assert list(tmp_path.iterdir()) == [tmp_path / HEARTBEAT_FILE]


async def test_the_end_is_told_with_its_reason(make, tmp_path):
    async with make():
        pass
    assert content(tmp_path)["ended"] == "finished"
    with pytest.raises(RewardError):
        async with make():
            raise RewardError("all failed")
    assert content(tmp_path)["ended"] == "RewardError: all failed"


async def test_a_cancelled_run_is_told_as_stopped_and_nothing_beats_on(make, tmp_path):
    async def run() -> None:
        async with make():
            await asyncio.Event().wait()

    task = asyncio.create_task(run())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert content(tmp_path)["ended"] == "stopped"
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_disk_that_can_not_be_written_costs_beats_and_not_the_run(make, time, tmp_path):
    obstacle = tmp_path / f".{HEARTBEAT_FILE}.1.tmp"
    async with make():
        obstacle.mkdir()  # simulates a full disk: permissions do not stop root, who may run the tests
        await time.pass_one_sleep()
        assert content(tmp_path)["time"] == 1000.0
        obstacle.rmdir()
        await time.pass_one_sleep()
        assert content(tmp_path)["time"] == 1000.0 + 2 * EVERY_S
        for path in tmp_path.iterdir():
            path.unlink()
        tmp_path.rmdir()
        await time.pass_one_sleep()
    assert not tmp_path.exists()


async def test_a_superseded_attempt_leaves_the_newer_heartbeat_alone(make, time, tmp_path):
    async with make(attempt=1):
        async with make(attempt=2):
            await time.pass_one_sleep()
            assert content(tmp_path)["attempt"] == 2
    assert content(tmp_path)["attempt"] == 2


async def test_a_damaged_heartbeat_is_replaced(make, tmp_path):
    for damaged in ("", "[]", '{"attempt": "two"}', "\x00"):
        (tmp_path / HEARTBEAT_FILE).write_text(damaged)
        async with make():
            assert content(tmp_path)["attempt"] == 1
