"""Finds nodes of a cluster that would be faster in the other compute type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import ray

from actors.groups.cluster import alive_nodes
from actors.machine.probe import Speed, machine_speed
from orchestrator.config.base import Dtype

PROBE_S = 20.0


def slower_nodes(dtype: Dtype, cache: Path) -> list[str]:
    """A console line about each node that multiplies faster in the other type. Needs a connection to Ray.

    Nodes measure themselves concurrently, once per kind of machine. A node that does not answer within PROBE_S is
    ignored.
    """
    here = ray.util.get_node_ip_address()
    return complaints(dtype, _measured([node.address for node in alive_nodes() if node.address != here], cache))


def complaints(dtype: Dtype, speed_of_node: Mapping[str, Speed]) -> list[str]:
    return [
        f"node {address} is of another kind ({speed.describe()}): this run computes in {dtype} everywhere, and is "
        f"slower there than in {speed.dtype}. A new run takes model.dtype={speed.dtype}; or leave this node out."
        for address, speed in speed_of_node.items()
        if speed.dtype != dtype
    ]


def _measured(addresses: Sequence[str], cache: Path) -> dict[str, Speed]:
    measure = ray.remote(machine_speed)
    calls = {
        measure.options(num_cpus=0, max_retries=0, resources={f"node:{address}": 0.001}).remote(cache): address
        for address in addresses
    }
    answered, late = ray.wait([*calls], num_returns=len(calls), timeout=PROBE_S) if calls else ([], [])
    for call in late:
        ray.cancel(call, force=True)
    speeds: dict[str, Speed] = {}
    for call in answered:
        try:
            speeds[calls[call]] = ray.get(call)
        except ray.exceptions.RayError:  # placement will report dead nodes
            continue
    return dict(sorted(speeds.items()))
