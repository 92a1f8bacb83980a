"""A stopped command ends with code 130 and one line, in any phase and whatever hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.stops import INTERRUPTED, STOPPED
from tests.deadlines import scaled

ROOT = Path(__file__).resolve().parents[3]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PROGRAM = """
import asyncio, ctypes, functools, operator, sys, threading, time, typer
sys.argv[0] = "-m"
import jobs
from jobs import command, stops

def ready():
    print("ready", flush=True)

def importing():
    with stops.ending_at_once():
        ready()
        while True:
            try:
                time.sleep(60)
            except BaseException:  # as some libraries do
                pass

def checking():
    ready()
    time.sleep(60)

def blocking(call, *args):  # the signal comes where Python no longer looks, right before the call
    pause = functools.partial(ctypes.CDLL(None).usleep, 500_000)
    return list(map(operator.call, [pause, functools.partial(call, *args)]))[1]

def about_to_block():
    ready()
    blocking(time.sleep, 60)

class LateSelector:
    def __init__(self, epoll):
        self.epoll = epoll

    def poll(self, timeout, events):
        return blocking(self.epoll.poll, timeout, events) if timeout > 1 else self.epoll.poll(timeout, events)

    def __getattr__(self, name):
        return getattr(self.epoll, name)

async def saves_late():
    selector = asyncio.get_running_loop()._selector
    selector._selector = LateSelector(selector._selector)
    await saves()

def about_to_wait():
    command.run_async(saves_late(), grace_s=30)

async def saves():
    try:
        ready()
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        await asyncio.sleep(1.5)
        print("saved", flush=True)
        raise

def running():
    command.run_async(saves(), grace_s=30)

def showing():
    command.run_async(asyncio.sleep(0), grace_s=30)
    checking()

def tidying():
    with stops.held():
        ready()
        time.sleep(1.5)
        print("tidied", flush=True)
    time.sleep(60)

async def ignores():
    ready()
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            pass

def hanging():
    command.UNWIND_S = 0.5
    command.run_async(ignores(), grace_s=1)

def threads():
    command.EXIT_S = 1
    threading.Thread(target=time.sleep, args=(60,)).start()
    checking()

phase = sys.argv[1]
if phase == "starting":
    ready()
    time.sleep(60)
sys.argv[1:] = []
typer.run(lambda: command.run_command(globals()[phase]))
"""


def start(phase: str, **more: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, phase],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,  # type: ignore[call-overload]
    )


def stopped(process: subprocess.Popen[str], *signals: signal.Signals, pause_s: float = 0.0) -> tuple[int, str, str]:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for number in signals:
        process.send_signal(number)
        time.sleep(pause_s)
    out, err = process.communicate(timeout=scaled(30))
    return process.returncode, out, err


@pytest.mark.parametrize("phase", ["starting", "importing", "checking", "showing"])
@pytest.mark.parametrize("number", SIGNALS)
def test_every_stop_in_every_phase_is_told_in_one_line(phase: str, number: signal.Signals) -> None:
    code, out, err = stopped(start(phase), number)
    assert (code, out, err) == (INTERRUPTED, "", f"{STOPPED}\n")


@pytest.mark.parametrize(
    "signals", [SIGNALS[:1], SIGNALS[1:2], SIGNALS[2:], [signal.SIGHUP, signal.SIGHUP], SIGNALS[1:]]
)
def test_a_run_that_is_stopped_saves_also_when_it_is_told_twice(signals: list[signal.Signals]) -> None:
    code, out, err = stopped(start("running"), *signals, pause_s=0.2)
    assert (code, out, err) == (INTERRUPTED, "saved\n", f"{STOPPED}\n")


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("phase", ["about_to_block", "about_to_wait"])
def test_a_stop_right_before_a_call_that_blocks_is_noticed(phase: str, number: signal.Signals) -> None:
    code, out, err = stopped(start(phase), number)
    assert (code, out, err) == (INTERRUPTED, "saved\n" if phase == "about_to_wait" else "", f"{STOPPED}\n")


def test_a_second_ctrl_c_cuts_saving_short() -> None:
    code, out, _ = stopped(start("running"), signal.SIGINT, signal.SIGINT, pause_s=1.2)
    assert (code, out) == (INTERRUPTED, "")


def test_what_must_not_be_cut_in_half_is_finished_first() -> None:
    code, out, err = stopped(start("tidying"), signal.SIGTERM, signal.SIGTERM, pause_s=0.2)
    assert (code, out, err) == (INTERRUPTED, "tidied\n", f"{STOPPED}\n")


@pytest.mark.parametrize("phase", ["hanging", "threads"])
def test_what_hangs_is_ended(phase: str) -> None:
    code, _, err = stopped(start(phase), signal.SIGTERM)
    assert code == INTERRUPTED
    assert "did not end in time" in err if phase == "hanging" else STOPPED in err


def test_a_hang_up_that_is_ignored_stays_ignored() -> None:
    process = start("checking", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    code, _, err = stopped(process, signal.SIGHUP, signal.SIGTERM, pause_s=0.5)
    assert code == INTERRUPTED
    assert STOPPED in err
