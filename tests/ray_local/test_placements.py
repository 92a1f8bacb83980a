"""Actors on Ray clusters with fake GPUs are where the plan says and see their own GPUs alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from benchmarks.placements import Found, demands, fake_gpus, found
from orchestrator.planning.placement import Mode
from tests.deadlines import scaled

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(scaled(300))]


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[None]:
    with fake_gpus(2, 2):
        yield


def places(lines: list[Found], role: str) -> list[tuple[str, str]]:
    return [(line.node, line.devices) for line in lines if line.role == role]


def assert_apart(lines: list[Found]) -> None:
    """No two actors of a role see one GPU, ranks are contiguous on nodes, and the recorder sees none."""
    for role in {line.role for line in lines}:
        seen = [(line.node, device) for line in lines if line.role == role for device in line.devices.split(",")]
        assert max(Counter(seen).values()) == 1, role
        nodes = [line.node for line in lines if line.role == role]
        assert len(list(dict.fromkeys(nodes))) == 1 + sum(a != b for a, b in zip(nodes, nodes[1:], strict=False))
    assert [devices for _, devices in places(lines, "recorder")] == [""]


@pytest.mark.usefixtures("two_nodes")
async def test_colocated_ranks_of_all_roles_share_their_gpus_in_order() -> None:
    lines = await found(demands({"policy": 4, "critic": 4, "rollout": 2}, engine_width=2), "colocated")
    assert_apart(lines)
    assert places(lines, "policy") == places(lines, "critic")
    wide = [
        (node, ",".join(device for at, device in places(lines, "policy") if at == node))
        for node, _ in places(lines, "rollout")
    ]
    assert places(lines, "rollout") == wide


@pytest.mark.usefixtures("two_nodes")
@pytest.mark.parametrize(
    ("mode", "counts", "sharing"),
    [
        ("separate", {"policy": 2, "critic": 1, "rollout": 1}, set()),
        ("mixed", {"policy": 2, "critic": 2, "rollout": 2}, {("policy", "critic")}),
    ],
)
async def test_only_roles_that_take_turns_share_gpus(
    mode: Mode, counts: dict[str, int], sharing: set[tuple[str, str]]
) -> None:
    lines = await found(demands(counts), mode)
    assert_apart(lines)
    assert {node for node, _ in places(lines, "policy")} != {node for node, _ in places(lines, "rollout")}
    assert len({node for node, _ in places(lines, "policy")}) == 1, "the policy fits on one node"
    pairs = {(one, two) for one in counts for two in counts if one < two or one == "policy"} - {("policy", "policy")}
    for one, two in pairs:
        together = set(places(lines, one)) & set(places(lines, two))
        assert bool(together) == ((one, two) in sharing or (two, one) in sharing), (one, two)
