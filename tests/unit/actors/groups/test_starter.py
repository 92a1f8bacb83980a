"""What a starter reserves, what actors see, and who starts first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.groups.cluster import bundles, requested_cpus
from actors.groups.devices import visible
from actors.groups.group import ActorGroup
from actors.groups.starter import Starter
from orchestrator.planning.placement import Demand, Node, place


def test_a_bundle_holds_whole_gpus_of_a_node_and_the_actors_on_them() -> None:
    demands = [
        Demand("policy", 3, 2.0, 1.0, is_whole=True),
        Demand("rollout", 1, 1.0, 2.0),
        Demand("recorder", 1, 1.0),
    ]
    plan = place(demands, [Node("a", 8.0, 2.0), Node("b", 8.0, 2.0)], mode="colocated")
    first, second, recorder = bundles(plan)
    assert (first.resources["GPU"], second.resources["GPU"]) == (2.0, 1.0)
    assert [first.gpus, second.gpus, recorder.gpus] == [[0, 1], [2], ()]
    assert [(slot.role, slot.rank) for slot in first.slots] == [("rollout", 0), ("policy", 0), ("policy", 1)]
    assert first.resources["CPU"] == pytest.approx((2 * 2.0 + 1.0) / 3)
    assert "GPU" not in recorder.resources
    every = [slot for bundle in bundles(plan) for slot in bundle.slots]
    assert len(every) == len(plan.slots) == len(set(every))


@given(st.integers(1, 9), st.integers(1, 16), st.floats(0.1, 40.0))
def test_what_actors_of_a_bundle_ask_for_never_exceeds_it_in_rays_units(roles: int, ranks: int, cpus: float) -> None:
    demands = [Demand(f"role {number}", ranks, cpus, 1.0, is_whole=True) for number in range(roles)]
    (bundle,) = bundles(place(demands, [Node("a", 1e4, 16.0)], mode="colocated"))
    reserved = math.floor(bundle.resources["CPU"] * 1e4)
    assert sum(round(requested_cpus(slot) * 1e4) for slot in bundle.slots) <= reserved


def test_without_gpus_each_actor_has_a_bundle_of_its_own() -> None:
    plan = place([Demand("policy", 2, 1.0), Demand("reward", 1, 1.0)], [Node("a", 4.0)], mode="separate")
    assert [bundle.resources for bundle in bundles(plan)] == [{"node:a": 0.001, "CPU": 1.0}] * 3


def test_an_actor_sees_its_gpus_or_none() -> None:
    assert visible(["3", "5"])["CUDA_VISIBLE_DEVICES"] == "3,5"
    assert visible([])["CUDA_VISIBLE_DEVICES"] == ""


async def test_engines_that_need_empty_gpus_are_ready_before_others_start_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[tuple[str, str]] = []

    class Group(ActorGroup):
        async def renew(self, _ranks: Sequence[int], _deadline_s: float) -> None:
            started.append((self.role, "starts"))
            started.append((self.role, "is ready"))

    async def nothing() -> None:
        pass

    starter = Starter([], mode="colocated", wait_s=1.0, collective_s=1.0, tell=lambda _: None)
    actors: list[Any] = []
    starter._groups = [Group("policy", actors), Group("rollout", actors, starts_alone=True), Group("reward", actors)]
    monkeypatch.setattr(starter, "place", nothing)
    await starter.place_again(1.0)
    assert started[:2] == [("rollout", "starts"), ("rollout", "is ready")]
    assert {role for role, _ in started[2:]} == {"policy", "reward"}
