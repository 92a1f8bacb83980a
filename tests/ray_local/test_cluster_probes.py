"""`check --cluster` on three hosts: what works is shown, and each fault is named while nothing hangs."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from time import monotonic

import pytest

from tests.deadlines import scaled
from tests.ray_local.net import SUBNET, Cluster, why_not

REASON = why_not()
pytestmark = [
    pytest.mark.ray,
    pytest.mark.heavy,
    pytest.mark.slow,
    pytest.mark.skipif(REASON is not None, reason=f"three nodes on one machine: {REASON}"),
    pytest.mark.timeout(scaled(900)),
]
ROOT = Path(__file__).resolve().parents[2]
PROBING_S = scaled(400.0)
RUN = (
    "stages=[rl]",
    "algorithm.name=ppo",
    "reward.name=rules",
    "reward.rules=[{function: 'actors.rewards.rules:length_target'}]",
    "policy.ranks=3",
    "policy.cpus_per_rank=1",
    "critic.cpus_per_rank=1",
    "reference.cpus_per_rank=1",
    "reward.cpus_per_replica=1",
    "rollout.cpus_per_replica=1",
)


def probed(cluster: Cluster, *overrides: str, **variables: str) -> tuple[list[str], str]:
    """(problems, output)"""
    settings = [f"{name}={value}" for name, value in {"PYTHONPATH": str(ROOT), **variables}.items()]
    command = ["env", *settings, "python", "-m", "tests.ray_local.probing", f"{SUBNET}.1:6379", *RUN, *overrides]
    done = cluster.run(*command, cwd=ROOT, timeout_s=PROBING_S)
    assert done.returncode == 0, done.stdout
    return json.loads(done.stdout.strip().splitlines()[-1]), done.stdout


def namespace_of(cluster: Cluster, number: int) -> str:
    return cluster.head.namespace.removesuffix("n1") + f"n{number}"


def test_all_nodes_connections_and_groups_of_a_healthy_cluster_are_shown(cluster: Cluster) -> None:
    problems, output = probed(cluster)
    assert problems == []
    assert "connections: 6 of 6 answer" in output
    (group,) = re.findall(r"group policy: 3 ranks on (.*) reduce", output)
    assert sorted(group.split(", ")) == [f"{SUBNET}.{number}" for number in (1, 2, 3)]


@pytest.mark.variant
def test_hosts_that_do_not_reach_each_other_are_named(cluster: Cluster) -> None:
    """Hosts 2 and 3 lose each other; both reach the head, so Ray itself works."""
    second = namespace_of(cluster, 2)
    route = ["ip", "-n", second, "route"]
    subprocess.run([*route, "add", "blackhole", f"{SUBNET}.3/32"], check=True, timeout=scaled(30))
    try:
        problems, output = probed(cluster)
    finally:
        subprocess.run([*route, "del", "blackhole", f"{SUBNET}.3/32"], check=True, timeout=scaled(30))
    assert "connections: 4 of 6 answer" in output
    connections, group = problems
    assert f"2 connections between nodes fail: {SUBNET}.2 to {SUBNET}.3" in connections
    assert f"{SUBNET}.3 to {SUBNET}.2" in connections
    assert "allow all TCP" in connections
    assert "the 3 ranks of policy" in group


@pytest.mark.variant
def test_settings_of_the_driver_reach_all_actors_and_a_wrong_interface_is_named(cluster: Cluster) -> None:
    started = monotonic()
    problems, _ = probed(cluster, GLOO_SOCKET_IFNAME="eth7")
    assert monotonic() - started < PROBING_S
    *nodes, group = problems
    assert [re.findall(rf"node {SUBNET}\.(\d): GLOO_SOCKET_IFNAME=eth7", problem) for problem in nodes] == [
        ["1"],
        ["2"],
        ["3"],
    ]
    assert "the 3 ranks of policy" in group
    assert "NCCL_DEBUG=INFO" in group
