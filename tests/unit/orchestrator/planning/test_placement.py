"""Placement: actors go to the least loaded node; errors give the numbers of what does not fit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import CapacityError
from orchestrator.planning.placement import Demand, Mode, Node, Plan, in_turn, place

PPO = [
    Demand("rollout", 1, 2.0),
    Demand("policy", 1, 1.0),
    Demand("critic", 1, 1.0),
    Demand("reward", 1, 1.0),
]


def test_colocated_roles_take_turns_on_the_cores_of_one_node() -> None:
    plan = place(PPO, [Node("a", 2.0)], mode="colocated")
    assert [slot.threads for slot in plan.of("rollout")] == [2]
    assert {slot.address for slot in plan.slots} == {"a"}
    assert sum(slot.cpu_share for slot in plan.slots) <= 2.0


def test_separate_roles_must_fit_together() -> None:
    with pytest.raises(CapacityError, match=r"together need 5 CPUs .* placement.mode=colocated"):
        place(PPO, [Node("a", 4.0)], mode="separate")
    plan = place(PPO, [Node("a", 5.0)], mode="separate")
    assert sum(slot.cpu_share for slot in plan.slots) == 5.0


def test_roles_spread_over_nodes() -> None:
    nodes = [Node("a", 2.0), Node("b", 2.0), Node("c", 2.0)]
    plan = place(PPO, nodes, mode="separate")
    assert plan.of("rollout")[0].address not in {plan.of(role)[0].address for role in ("policy", "critic", "reward")}
    assert {slot.address for slot in plan.slots} == {"a", "b", "c"}


def test_actors_without_gpus_leave_gpu_nodes_free() -> None:
    demands = [Demand("policy", 2, 1.0, 1.0), Demand("recorder", 1, 1.0)]
    plan = place(demands, [Node("gpu", 8.0, 2.0), Node("cpu", 2.0)], mode="separate")
    assert {slot.address for slot in plan.of("policy")} == {"gpu"}
    assert plan.of("recorder")[0].address == "cpu"


@pytest.mark.parametrize("mode", ["colocated", "separate"])
def test_a_shortage_names_role_kind_and_offer(mode: str) -> None:
    with pytest.raises(CapacityError, match=r"too few GPUs: role policy wants 1 × \(1 CPUs and 1 GPUs\).*a: 2 CPUs"):
        place([Demand("policy", 1, 1.0, 1.0)], [Node("a", 2.0)], mode=mode)  # type: ignore[arg-type]
    with pytest.raises(CapacityError, match=r"too few CPUs: role policy wants 64"):
        place([Demand("policy", 64, 1.0)], [Node("a", 2.0)], mode=mode)  # type: ignore[arg-type]
    with pytest.raises(CapacityError, match="no nodes"):
        place([Demand("policy", 1, 1.0)], [], mode=mode)  # type: ignore[arg-type]


def test_one_actor_is_never_split_over_nodes() -> None:
    with pytest.raises(CapacityError, match="role rollout"):
        place([Demand("rollout", 1, 3.0)], [Node("a", 2.0), Node("b", 2.0)], mode="colocated")


def on_gpus(plan: Plan, role: str) -> list[tuple[str, tuple[int, ...]]]:
    """Node and GPUs of each rank, by their numbers on the node."""
    return [(slot.address, tuple(plan.number_on_node(gpu) for gpu in slot.gpus)) for slot in plan.of(role)]


def test_colocated_rank_i_of_every_role_is_on_gpu_i() -> None:
    demands = [Demand(role, 4, 1.0, 1.0, is_whole=True) for role in ("policy", "critic")] + [
        Demand("rollout", 4, 2.0, 1.0)
    ]
    plan = place(demands, [Node("a", 8.0, 2.0), Node("b", 8.0, 4.0)], mode="colocated")
    for role in ("policy", "critic", "rollout"):
        assert on_gpus(plan, role) == [("b", (number,)) for number in range(4)]
    assert plan.gpus == ("b",) * 4


def test_a_group_that_fits_on_no_node_is_contiguous_on_each() -> None:
    demands = [Demand("policy", 6, 1.0, 1.0, is_whole=True), Demand("rollout", 3, 1.0, 2.0)]
    plan = place(demands, [Node("a", 8.0, 4.0), Node("b", 8.0, 4.0)], mode="colocated")
    assert on_gpus(plan, "policy") == [("a", (0,)), ("a", (1,)), ("a", (2,)), ("a", (3,)), ("b", (0,)), ("b", (1,))]
    assert on_gpus(plan, "rollout") == [("a", (0, 1)), ("a", (2, 3)), ("b", (0, 1))]


def test_an_actor_with_several_gpus_is_never_split_over_nodes() -> None:
    plan = place([Demand("rollout", 2, 1.0, 2.0)], [Node("a", 8.0, 3.0), Node("b", 8.0, 3.0)], mode="separate")
    assert on_gpus(plan, "rollout") == [("a", (0, 1)), ("b", (0, 1))]
    with pytest.raises(CapacityError, match="role rollout wants 3"):
        place([Demand("rollout", 3, 1.0, 2.0)], [Node("a", 8.0, 3.0), Node("b", 8.0, 3.0)], mode="separate")


def test_separate_groups_fill_nodes_instead_of_alternating() -> None:
    demands = [
        Demand("policy", 4, 1.0, 1.0, is_whole=True),
        Demand("critic", 2, 1.0, 1.0, is_whole=True),
        Demand("rollout", 2, 1.0, 1.0),
    ]
    plan = place(demands, [Node("a", 8.0, 4.0), Node("b", 8.0, 4.0)], mode="separate")
    assert {address for address, _ in on_gpus(plan, "policy")} == {"a"}
    assert on_gpus(plan, "critic") + on_gpus(plan, "rollout") == [("b", (number,)) for number in range(4)]


def test_mixed_engines_have_their_own_gpus_and_models_share_theirs() -> None:
    demands = [
        Demand("policy", 2, 1.0, 1.0, is_whole=True),
        Demand("reward", 2, 1.0, 1.0),
        Demand("rollout", 2, 1.0, 1.0),
    ]
    plan = place(demands, [Node("a", 8.0, 4.0)], mode="mixed")
    assert on_gpus(plan, "policy") == on_gpus(plan, "reward")
    assert not set(on_gpus(plan, "policy")) & set(on_gpus(plan, "rollout"))
    with pytest.raises(CapacityError, match="role rollout"):
        place(demands, [Node("a", 8.0, 3.0)], mode="mixed")


def test_separate_parts_of_a_gpu_belong_to_different_roles() -> None:
    plan = place([Demand("policy", 1, 1.0, 0.6), Demand("critic", 1, 1.0, 0.4)], [Node("a", 8.0, 1.0)], mode="separate")
    assert on_gpus(plan, "policy") == on_gpus(plan, "critic") == [("a", (0,))]
    with pytest.raises(CapacityError, match="role rollout"):
        place([Demand("rollout", 2, 1.0, 0.5)], [Node("a", 8.0, 1.0)], mode="separate")


def test_a_process_group_on_cpus_stays_on_one_node_where_it_fits() -> None:
    nodes = [Node("a", 4.0), Node("b", 4.0)]
    apart = place([Demand("reward", 2, 1.0)], nodes, mode="separate")
    assert {slot.address for slot in apart.slots} == {"a", "b"}
    whole = place([Demand("policy", 4, 1.0, is_whole=True)], nodes, mode="separate")
    assert {slot.address for slot in whole.slots} == {"a"}
    split = place([Demand("policy", 6, 1.0, is_whole=True)], nodes, mode="separate")
    assert [slot.address for slot in split.slots] == ["a", "a", "a", "b", "b", "b"]


roles = st.lists(
    st.builds(
        Demand,
        st.sampled_from(["policy", "critic", "reference", "reward", "rollout"]),
        st.integers(1, 4),
        st.sampled_from([0.5, 1.0, 2.0]),
        st.sampled_from([0.0, 0.5, 1.0, 2.0]),
        st.booleans(),
    ),
    min_size=1,
    max_size=5,
    unique_by=lambda demand: demand.role,
)
machines = st.lists(
    st.tuples(st.sampled_from([2.0, 4.0, 8.0]), st.sampled_from([0.0, 1.0, 4.0])), min_size=1, max_size=4
)


@given(roles, machines, st.sampled_from(["colocated", "separate", "mixed"]))
def test_a_plan_holds_every_actor_and_never_reserves_more_than_a_node_has(
    demands: list[Demand], sizes: list[tuple[float, float]], mode: Mode
) -> None:
    nodes = [Node(f"node-{index}", cpus, gpus) for index, (cpus, gpus) in enumerate(sizes)]
    try:
        plan = place(demands, nodes, mode=mode)
    except CapacityError:
        return
    for demand in demands:
        assert [slot.rank for slot in plan.of(demand.role)] == list(range(demand.count))
    for node in nodes:
        there = [slot for slot in plan.slots if slot.address == node.address]
        assert sum(slot.cpu_share for slot in there) <= node.cpus + 1e-9
        assert plan.gpus.count(node.address) <= node.gpus
    for demand in demands:
        seen = [gpu for slot in plan.of(demand.role) for gpu in slot.gpus]
        assert len(seen) == len(set(seen)) == demand.count * demand.width
        assert all(plan.gpus[gpu] == slot.address for slot in plan.of(demand.role) for gpu in slot.gpus)


def test_a_plan_is_the_same_for_the_same_input() -> None:
    nodes = [Node("b", 2.0), Node("a", 2.0)]
    assert place(PPO, nodes, mode="colocated") == place(list(reversed(PPO)), nodes, mode="colocated")


@pytest.mark.parametrize(
    ("mode", "on_gpus", "expected"),
    [
        ("colocated", {"policy", "reward", "rollout"}, {"policy", "reward", "rollout"}),
        ("colocated", {"rollout"}, set()),
        ("colocated", {"policy"}, {"policy"}),
        ("mixed", {"policy", "reward", "rollout"}, {"policy", "reward"}),
        ("mixed", {"rollout"}, set()),
        ("separate", {"policy", "reward", "rollout"}, set()),
    ],
)
def test_models_take_turns_and_engines_only_with_models_on_their_gpus(
    mode: Mode, on_gpus: set[str], expected: set[str]
) -> None:
    assert in_turn(on_gpus, mode) == expected
