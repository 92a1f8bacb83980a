"""Inspects processes from outside, on their nodes, because a hanging process does not answer."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.groups.process import Whereabouts
from orchestrator.concurrency import together

LIMIT_S = 8.0  # a missed deadline is reported with its stacks within ten seconds
_STACKS_S = 4.0
_LOG_LINES = 15
_STATES = {"T": "stopped (SIGSTOP)", "Z": "gone", "D": "waits for a disk or a device"}


@dataclass(frozen=True)
class Evidence:
    """Args:
    state: "running", "stopped (SIGSTOP)", "gone", or why it is unknown.
    stacks: of all its threads, by py-spy; empty: not requested.
    log: last lines of its standard error.
    """

    state: str
    stacks: str = ""
    log: Sequence[str] = ()


async def inspect(process: Whereabouts | None, *, stacks: bool) -> Evidence:
    """Never fails: the evidence reports what is unknown."""
    if process is None:
        return Evidence("it never became ready")
    return await _on_node(process, _look, Evidence(f"node {process.address} does not answer"), stacks)


async def kill(processes: Sequence[Whereabouts]) -> None:
    """Sends SIGKILL, which a stopped process can't ignore. Ignores nodes that do not answer."""
    await together(_on_node(process, _end, None) for process in processes)


async def _on_node(process: Whereabouts, work: Any, otherwise: Any, *arguments: Any) -> Any:
    there = NodeAffinitySchedulingStrategy(process.node_id, soft=False)
    task = ray.remote(work).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
    try:
        return await asyncio.wait_for(task.remote(process.pid, *arguments), LIMIT_S)
    except Exception:  # noqa: BLE001  a lost node may raise anything
        return otherwise


def _look(pid: int, stacks: bool) -> Evidence:
    try:
        # The field after the name in parentheses, which may contain spaces.
        letter = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        letter = "Z"
    state = _STATES.get(letter, "running")
    return Evidence(state, _stacks(pid) if stacks and state != "gone" else "", _last_lines(pid))


def _stacks(pid: int) -> str:
    program = shutil.which("py-spy", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        return "no stacks: py-spy is not installed on this node"
    # Without --nonblocking py-spy waits for a stopped process to stop.
    command = [program, "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_STACKS_S, check=False)
    except subprocess.TimeoutExpired:
        return f"no stacks: py-spy took more than {_STACKS_S:g} s"
    return done.stdout or f"no stacks: {done.stderr.strip()} (a container needs the capability SYS_PTRACE)"


def _last_lines(pid: int) -> list[str]:
    """Ray names a worker's log files after its process, in the same folder as this process's."""
    with contextlib.suppress(OSError):
        folder = Path(os.readlink("/proc/self/fd/2")).parent
        for file in folder.glob(f"worker-*-{pid}.err"):
            return file.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
    return []


def _end(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
