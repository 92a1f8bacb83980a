"""The started cluster offers what the mounted config needs, and roles land on the intended nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.config.config import Config
from orchestrator.errors import CapacityError
from orchestrator.planning.demands import all_demands, engine_demand
from orchestrator.planning.placement import Node, place
from tests.k8s.crds import Manifest
from tests.k8s.house_rules import rayjob_of
from tests.k8s.kuberay_rules import groups_of
from tests.k8s.test_overlays import converted, run_config


def nodes_of(objects: list[Manifest], *, count: str) -> list[Node]:
    """The Ray nodes that accept work, named by group, with each group's `count` (a field of the group)."""
    types = converted(objects)
    return [
        Node(f"{group['groupName']}-{number}", resources["CPU"], resources.get("GPU", 0))
        for group in groups_of(rayjob_of(objects))
        if (resources := types[group["groupName"]]["resources"])["CPU"]
        for number in range(group[count])
    ]


def groups_used(config: Config, nodes: list[Node], role: str) -> set[str]:
    plan = place(all_demands(config), nodes, mode=config.placement.mode)
    return {slot.address.rsplit("-", 1)[0] for slot in plan.of(role)}


@pytest.mark.parametrize("count", ["replicas", "minReplicas"])
@pytest.mark.parametrize("learning", [True, False])
def test_every_stage_finds_its_place(objects: list[Manifest], tmp_path: Path, count: str, learning: bool) -> None:
    config = run_config(objects, tmp_path)
    needed = all_demands(config) if learning else [engine_demand(config)]
    plan = place(needed, nodes_of(objects, count=count), mode=config.placement.mode)
    assert len(plan.slots) == sum(demand.count for demand in needed)


def test_gpu_engines_and_ranks_keep_to_their_groups(gpu_objects: list[Manifest], tmp_path: Path) -> None:
    config, nodes = run_config(gpu_objects, tmp_path), nodes_of(gpu_objects, count="replicas")
    assert groups_used(config, nodes, "rollout") == {"rollout"}
    for role in ("policy", "critic", "reference", "reward", "recorder"):
        assert groups_used(config, nodes, role) == {"trainer"}


def test_gpu_overlay_offers_no_gpu_that_stays_unused(gpu_objects: list[Manifest], tmp_path: Path) -> None:
    config, nodes = run_config(gpu_objects, tmp_path), nodes_of(gpu_objects, count="replicas")
    wanted = sum(demand.count * demand.gpus for demand in all_demands(config))
    assert wanted == sum(node.gpus for node in nodes)


def test_one_trainer_pod_less_is_too_few(gpu_objects: list[Manifest], tmp_path: Path) -> None:
    config, nodes = run_config(gpu_objects, tmp_path), nodes_of(gpu_objects, count="replicas")
    with pytest.raises(CapacityError, match="too few"):
        groups_used(config, [node for node in nodes if node.address != "trainer-1"], "policy")
