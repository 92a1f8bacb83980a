"""A tracker that blocks, fails or is absent does not affect the run: one line reports it, and it catches up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

import pytest

from actors.watching.background import BackgroundTracker
from orchestrator.roles import Trackers
from tests.deadlines import scaled


class Server:
    """A tracker's server: up or down, with a given speed."""

    def __init__(self) -> None:
        self.is_up = True
        self.answers = threading.Event()
        self.answers.set()
        self.fault: BaseException = ConnectionError("connection refused")
        self.starts: list[int] = []
        self.steps: list[int] = []
        self.is_closed = False

    def start(self, first_step: int) -> Trackers:
        self.answers.wait()
        if not self.is_up:
            raise self.fault
        self.starts.append(first_step)
        return self

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.answers.wait()
        if not self.is_up:
            raise self.fault
        if metrics.get("poison"):
            raise ValueError("a name that it does not want")
        self.steps.append(step)

    def close(self) -> None:
        self.is_closed = True


def until(condition: Callable[[], bool]) -> None:
    by = time.monotonic() + scaled(10.0)
    while not condition():
        assert time.monotonic() < by
        time.sleep(0.01)


def tracker_of(server: Server, told: list[str], **options: float) -> BackgroundTracker:
    settings = {"first_pause_s": 0.02, "close_s": 5.0, **options}
    return BackgroundTracker("MLflow", server.start, told.append, **settings)  # type: ignore[arg-type]


def test_what_is_logged_arrives_in_order_before_it_closes() -> None:
    server, told = Server(), list[str]()
    tracker = tracker_of(server, told)
    for step in range(3, 50):
        tracker.log(step, {"reward/mean": 1.0})
    tracker.close()
    assert (server.starts, server.steps, server.is_closed, told) == ([3], list(range(3, 50)), True, [])


@pytest.mark.parametrize("fault", [ConnectionError("connection refused"), SystemExit(1), KeyboardInterrupt()])
def test_one_that_goes_is_told_once_and_catches_up(fault: BaseException) -> None:
    server, told = Server(), list[str]()
    server.fault = fault
    tracker = tracker_of(server, told)
    tracker.log(0, {})
    until(lambda: server.steps == [0])
    server.is_up = False
    for step in range(1, 10):
        tracker.log(step, {})
    until(lambda: len(told) == 1)
    assert told[0].startswith(f"MLflow: {type(fault).__name__}: ")
    assert "metrics.jsonl holds all metrics" in told[0]
    time.sleep(0.2)
    server.is_up = True
    until(lambda: len(told) == 2)
    assert server.steps == list(range(10))
    assert told[1:] == ["MLflow: answers again and has all metrics"]
    tracker.close()
    assert len(told) == 2


def test_one_that_is_absent_from_the_start_catches_up() -> None:
    server, told = Server(), list[str]()
    server.is_up = False
    tracker = tracker_of(server, told)
    for step in range(5):
        tracker.log(step, {})
    until(lambda: len(told) == 1)
    server.is_up = True
    until(lambda: len(told) == 2)
    tracker.close()
    assert (server.starts, server.steps) == ([0], [0, 1, 2, 3, 4])


def test_one_that_blocks_is_told_and_never_waited_for() -> None:
    server, told = Server(), list[str]()
    server.answers.clear()
    tracker = tracker_of(server, told, slow_s=0.1)
    started = time.monotonic()
    for step in range(1000):
        tracker.log(step, {})
    assert time.monotonic() - started < scaled(1.0)
    time.sleep(0.2)
    tracker.log(1000, {})
    assert len(told) == 1
    assert told[0].startswith("MLflow: has not answered for 0 s. The run continues")
    started = time.monotonic()
    tracker.close()
    assert time.monotonic() - started < scaled(4.0)
    assert told[1] == "MLflow: 1001 lines of metrics were not sent; metrics.jsonl holds them all"
    server.answers.set()


def test_what_waits_is_bounded() -> None:
    server, told = Server(), list[str]()
    server.is_up = False
    tracker = tracker_of(server, told, most_waiting=10)
    for step in range(30):
        tracker.log(step, {})
    until(lambda: len(told) == 1)
    server.is_up = True
    until(lambda: len(told) == 2)
    assert server.steps == list(range(20, 30))
    assert told[1] == "MLflow: answers again and has all metrics but for 20 lines"
    tracker.close()


def test_a_line_that_it_refuses_does_not_hold_up_the_others() -> None:
    server, told = Server(), list[str]()
    tracker = tracker_of(server, told)
    tracker.log(0, {})
    tracker.log(1, {"poison": 1.0})
    tracker.log(2, {})
    until(lambda: server.steps == [0, 2])
    tracker.close()
    assert [line.partition(".")[0] for line in told[:2]] == [
        "MLflow: ValueError: a name that it does not want",
        "MLflow: answers again and has all metrics but for 1 lines",
    ]
