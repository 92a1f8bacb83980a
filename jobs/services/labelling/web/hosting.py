"""A service of a store as a child of this process: started again when it ends, and ended with this process."""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from jobs.services.labelling.store import Store
from orchestrator.concurrency import cancel
from orchestrator.errors import StorageError

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_STABLE_S = 60.0  # after this time the next pause is the first one again
_STOP_S = 10.0
_OTHER_S = 5.0  # between two looks whether another service has the store
# The service is open to a network and needs none of the environment's secrets but those of its database.
_KEPT = ("PATH", "LD_LIBRARY_PATH", "HOME", "TMPDIR", "LANG", "LC_ALL")
Say = Callable[[str], None]


def command_of(place: str, address: str, guidelines: Path | None) -> list[str]:
    """The command of a service. `address` is host:port."""
    host, _, port = address.rpartition(":")
    words = ["label", "serve", "--store", place, "--host", host.strip("[]"), "--port", port, "--until-eof"]
    return [sys.executable, "-m", "jobs", *words, *(["--guidelines", str(guidelines)] if guidelines else [])]


@dataclass
class Hosted:
    """`is_running`: this process has the service, and no other one."""

    is_running: bool = False


@asynccontextmanager
async def hosting(store: Store, command: Sequence[str], say: Say) -> AsyncIterator[Hosted]:
    """Runs the service while the body runs, and no other process serves the store.

    Its standard input is a pipe that nobody writes to. The kernel closes it when this process ends, however it ends,
    and the service then stops.

    Args:
        say: gets the service's lines, and a line each time it ends.
    """
    hosted = Hosted()
    keeper = asyncio.create_task(_keep(store, command, say, hosted))
    try:
        yield hosted
    finally:
        await cancel([keeper])


async def _keep(store: Store, command: Sequence[str], say: Say, hosted: Hosted) -> None:
    pause_s, told = _FIRST_PAUSE_S, ""
    while True:
        await _until_free(store, say)
        began, hosted.is_running = monotonic(), True
        last = await _serve(command, say, told)
        hosted.is_running = False
        if monotonic() - began > _STABLE_S:
            pause_s, told = _FIRST_PAUSE_S, ""
        if last != told:
            say(f"WARNING the labelling service ended ({last}); it is started again until it runs")
            told = last
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


async def _until_free(store: Store, say: Say) -> None:
    was_told = False
    while True:
        with suppress(StorageError):
            if not await asyncio.to_thread(store.is_served):
                return
            if not was_told:
                say(f"another service has {store.place}, so this run serves no page")
                was_told = True
        await asyncio.sleep(_OTHER_S)


async def _serve(command: Sequence[str], say: Say, told: str) -> str:
    """Runs the service until it ends. Returns its last line."""
    kept = {name: os.environ[name] for name in os.environ if name in _KEPT or name.startswith("PG")}
    environment = {**kept, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=PIPE,
        stdout=PIPE,
        stderr=STDOUT,
        env=environment,
        start_new_session=True,  # Ctrl-C is for the run, which then stops it
    )
    assert process.stdout is not None
    last = "it said nothing"
    try:
        async for line in process.stdout:
            last = line.decode("utf-8", "replace").strip() or last
            if last != told:
                say(last)
        await process.wait()
    finally:
        await _end(process)
    return last


async def _end(process: Process) -> None:
    if process.returncode is not None:
        return
    assert process.stdin is not None
    process.stdin.close()
    with suppress(TimeoutError):
        await asyncio.wait_for(process.wait(), _STOP_S)
        return
    process.kill()
    await process.wait()
