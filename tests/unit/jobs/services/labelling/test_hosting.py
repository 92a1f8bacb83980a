"""The service as a child: started again, ended with its parent, and left to another process that has the store."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import httpx
import psutil

from jobs.services.labelling.store import Store
from jobs.services.labelling.web.hosting import command_of, hosting
from tests.deadlines import scaled
from tests.unit.jobs.services.labelling.running import ROOT, free_port, service, until_healthy

PARENT = """
import asyncio, sys
from jobs.services.labelling.web.hosting import command_of, hosting
from jobs.services.labelling.store import Store

async def main(place, address):
    async with hosting(Store(place), command_of(place, address, None), lambda line: print(line, flush=True)):
        await asyncio.sleep(600)

asyncio.run(main(*sys.argv[1:]))
"""


async def answers(port: int) -> bool:
    async with httpx.AsyncClient() as client:
        try:
            return (await client.get(f"http://127.0.0.1:{port}/healthz")).status_code == 200
        except httpx.HTTPError:
            return False


async def reached(port: int, *, up: bool = True) -> None:
    async with asyncio.timeout(scaled(30)):
        while await answers(port) is not up:  # noqa: ASYNC110  another process answers
            await asyncio.sleep(0.05)


def child_of(pid: int) -> psutil.Process:
    (child,) = [one for one in psutil.Process(pid).children(recursive=True) if "serve" in one.cmdline()]
    return child


async def test_a_service_that_is_killed_is_started_again_at_the_same_address(tmp_path: Path) -> None:
    store, port, lines = Store(str(tmp_path / "labels.db")), free_port(), []
    guidelines = tmp_path / "guidelines.txt"
    guidelines.write_text("Be fair.")
    command = command_of(str(tmp_path / "labels.db"), f"127.0.0.1:{port}", guidelines)
    async with hosting(store, command, lines.append) as hosted:
        await reached(port)
        assert hosted.is_running and store.is_served()
        child = child_of(psutil.Process().pid)
        assert "RAY_AUTH_TOKEN" not in child.environ() and str(guidelines) in child.cmdline()
        child.kill()
        await reached(port, up=False)
        await reached(port)
        assert child_of(psutil.Process().pid).pid != child.pid
        assert sum("WARNING the labelling service ended" in line for line in lines) == 1
        printed = "\n".join(lines)  # it becomes the log of a run, which others read
        assert "#" not in printed and f"rlhf label invite NAME --store {tmp_path / 'labels.db'}" in printed
    assert not await answers(port) and not store.is_served()


async def test_another_service_keeps_the_store(tmp_path: Path) -> None:
    place, port, other = tmp_path / "labels.db", free_port(), free_port()
    store, lines = Store(str(place)), []
    with service(place, other) as process:
        await asyncio.to_thread(until_healthy, other, process)
        async with hosting(store, command_of(str(place), f"127.0.0.1:{port}", None), lines.append) as hosted:
            await asyncio.sleep(1.0)
            assert not hosted.is_running and not await answers(port) and await answers(other)
    assert lines == [f"another service has {place}, so this run serves no page"]


async def test_a_service_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    place, port = tmp_path / "labels.db", free_port()
    command = [sys.executable, "-c", PARENT, str(place), f"127.0.0.1:{port}"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as parent:  # noqa: ASYNC220
        await reached(port)
        child = child_of(parent.pid)
        parent.kill()
        await reached(port, up=False)
        await asyncio.to_thread(psutil.wait_procs, [child], timeout=scaled(10))
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
