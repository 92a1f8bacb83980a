"""Peaks of a GPU by phase, worked by hand."""

from __future__ import annotations

import pytest

from orchestrator.errors import CapacityError
from orchestrator.planning.memory import (
    GIB,
    Memory,
    ModelSize,
    Sharding,
    gpu_engine_memory,
    learner_memory,
    scorer_memory,
)
from orchestrator.planning.needs import NodeOffer, Sharing, needs, too_much
from orchestrator.planning.peaks import CONTEXT, CUDA_GRAPHS, FRAGMENTATION, highest, peaks
from orchestrator.planning.placement import Demand, Node, place

FREE = 1 + FRAGMENTATION
POLICY = Memory(state=100, working=30, resting=80, moments=40, scoring=5, sending=7)
CRITIC = Memory(state=60, working=20, resting=40, moments=20, scoring=4)
ENGINE = Memory(state=50, working=10, cache=200, sending=6)
ROLES = {"policy": POLICY, "critic": CRITIC, "rollout": ENGINE}
ASLEEP = CONTEXT + CUDA_GRAPHS


def test_each_phase_holds_what_the_table_of_turns_says() -> None:
    found = {peak.phase: peak.parts for peak in peaks(ROLES, takes_turns=True)}
    by_hand = {
        "start": (60 * FREE, 40 * FREE, 0),
        "sample": (20 * FREE, 20 * FREE, 50 + 200 + 10),
        "score": (25 * FREE, 24 * FREE, 0),
        "policy": (130 * FREE, 20 * FREE, 0),
        "critic": (20 * FREE, 80 * FREE, 0),
        "publish": (27 * FREE, 20 * FREE, 50 + 6),
    }
    assert list(found) == list(by_hand)
    for phase, (policy, critic, engine) in by_hand.items():
        expected = {"policy": CONTEXT + policy, "critic": CONTEXT + critic, "rollout": ASLEEP + engine}
        assert found[phase] == pytest.approx(expected), phase


def test_without_turns_all_parts_are_there_at_once() -> None:
    (peak,) = peaks(ROLES, takes_turns=False)
    assert peak.total == pytest.approx(3 * CONTEXT + CUDA_GRAPHS + (130 + 80) * FREE + 260)


def test_a_role_in_parts_starts_with_all_its_weights() -> None:
    """Per parameter 2 bytes of weights; of a learner's part 2 + 2 + 4 + 4 before its first update, and 8 of moments."""
    size = ModelSize(num_params=1000, num_layers=1, hidden=1, feed_forward=1, vocabulary=1)

    def starting(stage: int, ranks: int) -> float:
        found = learner_memory(
            size,
            Sharding("bfloat16", stage, ranks),
            micro_batch_tokens=1,
            gradient_checkpointing=True,
            logits=False,
        )
        return peaks({"policy": found, "rollout": ENGINE}, takes_turns=True)[0].parts["policy"]

    assert starting(3, 8) == pytest.approx(CONTEXT + 2000 * FREE), "not the 12 / 8 × 1000 of its part"
    assert starting(3, 2) == pytest.approx(CONTEXT + 12 / 2 * 1000 * FREE)
    assert starting(1, 8) == pytest.approx(CONTEXT + (2 + 2 + 4 + 4 / 8) * 1000 * FREE)
    for takes_turns in (True, False):
        for shards, state in ((1, 2000), (8, 250)):
            memory = scorer_memory(size, dtype="bfloat16", shards=shards, micro_batch_tokens=1, logits=False)
            assert (memory.state, memory.starting) == (state, 2000)
            first = peaks({"reference": memory, "rollout": ENGINE}, takes_turns=takes_turns)[0]
            assert first.parts["reference"] >= CONTEXT + 2000 * FREE


def test_what_rests_is_all_but_the_weights() -> None:
    size = ModelSize(num_params=1000, num_layers=3, hidden=8, feed_forward=16, vocabulary=100)
    sharding = Sharding("bfloat16", 3, 4)
    memory = learner_memory(size, sharding, micro_batch_tokens=10, gradient_checkpointing=True, logits=True)
    assert memory.weights == 2 * 1000 / 4
    assert (memory.resting, memory.moments) == ((2 + 4 + 4 + 8) * 1000 / 4, 8 * 1000 / 4)
    frozen = learner_memory(
        size,
        Sharding("bfloat16", 1, 1),
        micro_batch_tokens=10,
        gradient_checkpointing=True,
        logits=True,
        adapters=50,
    )
    assert frozen.weights == 2 * 1000 + 2 * 50


def shared(gpu_memory: float | None, utilization: float) -> tuple[list[str], str]:
    """(warnings, description of the GPU) of a policy and an engine that share one."""
    demands = [Demand("policy", 1, 1.0, 1.0, is_whole=True), Demand("rollout", 1, 1.0, 1.0)]
    plan = place(demands, [Node("a", 4.0, 1.0)], mode="colocated")
    memory_of = {
        "policy": Memory(state=30 * GIB, working=3 * GIB, resting=24 * GIB, moments=12 * GIB),
        "rollout": Memory(state=4 * GIB, working=1 * GIB),
    }
    found = needs(plan, memory_of, {"a": NodeOffer(None, gpu_memory)}, Sharing("colocated", utilization))
    return too_much(found), found[-1].describe()


def test_an_engine_fills_its_share_and_too_large_a_share_is_refused_with_the_one_that_fits() -> None:
    warnings, text = shared(40 * GIB, 0.8)
    assert "phase sample 39.3 GiB (policy 7.3, rollout 32.0), available 40.0 GiB" in text
    assert "rlhf plan" in warnings[0]
    assert shared(42 * GIB, 0.7)[0] == []
    with pytest.raises(CapacityError, match=r"phase sample .*rollout.gpu_memory_utilization=0.81 would leave"):
        shared(40 * GIB, 0.85)
    with pytest.raises(CapacityError, match=r"utilization=0.1 of a GPU's 40.0 GiB has no room for a KV cache"):
        shared(40 * GIB, 0.1)


def test_gpus_of_unknown_memory_are_a_warning_that_names_the_key() -> None:
    warnings, text = shared(None, 0.8)
    assert "placement.gpu_memory_gib" in warnings[0] and "available unknown" in text


def test_more_sequences_and_larger_vocabularies_take_more_of_an_engine() -> None:
    small = ModelSize(num_params=1000, num_layers=3, hidden=8, feed_forward=16, vocabulary=100)
    few, many = (
        gpu_engine_memory(small, dtype="bfloat16", tensor_parallel_size=2, sequences=count) for count in (64, 512)
    )
    assert many.working - few.working == 3 * 4 * (512 - 64) * 100 / 2
    assert few.state == 1000
    assert (
        highest(peaks({"rollout": many}, takes_turns=True)).total
        > highest(peaks({"rollout": few}, takes_turns=True)).total
    )
