"""What `check --cluster` says of what its probes found."""

from __future__ import annotations

from dataclasses import replace

import pytest

from actors.groups.probes import Findings, NodeFacts
from actors.machine.devices import Build, Device
from jobs.check.capacity import Cluster
from jobs.check.nodes import groups_of, problems_of, warnings_of, with_gpu_memory
from orchestrator.config.loader import load_config
from orchestrator.planning.needs import NodeOffer
from orchestrator.planning.placement import Node

GIB = 1 << 30
H100 = Device("NVIDIA H100 80GB HBM3", 80 * GIB, 79 * GIB, (9, 0), [1])
OTHER = replace(H100, peers=[0])
FACTS = NodeFacts(
    address="10.0.0.1",
    build=Build("2.13.0", (13, 0), ("sm_90",)),
    cuda=(13, 0),
    release="580.95.05",
    devices=[H100, OTHER],
    interfaces={"lo": ["127.0.0.1"], "eth0": ["10.0.0.1"], "ib0": ["10.1.0.1"]},
    network={},
    shared_bytes=16 * GIB,
    versions={"torch": "2.13.0", "vllm": "0.32.0"},
)
NODES = [Node("10.0.0.1", 16.0, 2.0), Node("10.0.0.2", 16.0, 2.0)]
HEALTHY = Findings(
    facts={"10.0.0.1": FACTS, "10.0.0.2": replace(FACTS, address="10.0.0.2")},
    latency_s={("10.0.0.1", "10.0.0.2"): 1e-4, ("10.0.0.2", "10.0.0.1"): 1e-4},
)


def with_node(**changes: object) -> Findings:
    return replace(HEALTHY, facts={**HEALTHY.facts, "10.0.0.2": replace(FACTS, address="10.0.0.2", **changes)})


def test_a_healthy_cluster_has_no_problems() -> None:
    assert list(problems_of(HEALTHY, NODES)) == []
    assert list(warnings_of(HEALTHY)) == []


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (with_node(cuda=(12, 4), release="550.54.15", devices=[]), ["Ray offers 2 GPUs", "CUDA 13.0", "driver 580"]),
        (
            with_node(build=Build("2.13.0+cpu", None), cuda=None, devices=[]),
            ["offers 2 GPUs", "requirements/gpu.txt"],
        ),
        (with_node(devices=[replace(H100, peers=[])]), ["Ray offers 2 GPUs, and its processes see 1", "--num-gpus"]),
        (with_node(devices=[replace(H100, capability=(7, 0)), OTHER]), ["compute capability 7.0"]),
        (with_node(network={"NCCL_SOCKET_IFNAME": "ens"}), ["NCCL_SOCKET_IFNAME=ens", "lo, eth0, ib0"]),
        (with_node(network={"GLOO_SOCKET_IFNAME": "eth1"}), ["GLOO_SOCKET_IFNAME=eth1"]),
        (with_node(versions={"torch": "2.14.0", "vllm": "0.32.0"}), ["releases of torch: 2.13.0 on 10.0.0.1; 2.14.0"]),
        (with_node(versions={"torch": "2.13.0"}), ["releases of vllm: 0.32.0 on 10.0.0.1; none on 10.0.0.2"]),
        (replace(HEALTHY, silent={"10.0.0.2": "no answer within 120 s"}), ["10.0.0.2: its probe does not answer"]),
        (
            replace(HEALTHY, cut={("10.0.0.1", "10.0.0.2"): "port 4711: timed out"}),
            ["1 connections between nodes fail: 10.0.0.1 to 10.0.0.2, port 4711: timed out", "allow all TCP"],
        ),
    ],
)
def test_a_problem_is_named_with_its_node_and_the_way_out(found: Findings, expected: list[str]) -> None:
    (problem,) = problems_of(found, NODES)
    assert all(part in problem for part in expected), problem


@pytest.mark.parametrize("value", ["eth", "=eth0", "eth0,eth1", "^docker", "^lo"])
def test_interfaces_are_matched_as_nccl_matches_them(value: str) -> None:
    assert list(problems_of(with_node(network={"NCCL_SOCKET_IFNAME": value}), NODES)) == []


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (with_node(devices=[replace(H100, free_bytes=40 * GIB), OTHER]), "40.0 GiB of 80.0 GiB are free on GPU 0"),
        (with_node(devices=[replace(H100, peers=[]), OTHER]), "GPUs 0 can't access the memory of all others"),
        (with_node(shared_bytes=64 << 20), "/dev/shm has 0.1 GiB"),
    ],
)
def test_what_costs_time_or_memory_is_a_warning(found: Findings, expected: str) -> None:
    assert list(problems_of(found, NODES)) == []
    (warning,) = warnings_of(found)
    assert "10.0.0.2" in warning
    assert expected in warning


def test_the_memory_of_gpus_that_ray_does_not_know_counts_in_the_plan() -> None:
    cluster = Cluster("two nodes", NODES, {node.address: NodeOffer(256 * GIB) for node in NODES})
    seen = with_gpu_memory(cluster, HEALTHY.facts)
    assert {offer.gpu_memory for offer in seen.offers.values()} == {80 * GIB}


def test_the_groups_of_several_ranks_are_tried() -> None:
    def found(*overrides: str) -> dict[str, int]:
        config = load_config(None, overrides)
        return {group.role: group.num_ranks for group in groups_of(config, [Node("a", 64.0), Node("b", 64.0)])}

    ranks = ("policy.ranks=2", "critic.ranks=3", "reference.ranks=2", "reward_model.ranks=2", "algorithm.name=ppo")
    stages = "stages=[sample, preferences, reward_model, rl]"
    assert found(stages, *ranks) == {"reward_model": 2, "policy": 2, "critic": 3}
    assert found(stages, *ranks, "reference.sharded=true")["reference"] == 2
    assert found(stages, "algorithm.name=ppo") == {}
