"""Memory of a node's host, at the start and in a step, worked by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from orchestrator.planning.host import PUBLISH, host_peaks
from orchestrator.planning.memory import (
    COORDINATOR_PROCESS,
    GIB,
    LEARNER_PROCESS,
    RAY_PROCESSES,
    SCORER_PROCESS,
    Memory,
    ModelSize,
    Sharding,
    learner_memory,
    scorer_memory,
)
from orchestrator.planning.peaks import START, WHOLE_STEP, highest
from orchestrator.planning.placement import Demand, Mode, Node, in_turn, place

SIZE = ModelSize(num_params=1000, num_layers=3, hidden=8, feed_forward=16, vocabulary=100, stored="bfloat16")
POLICY = Memory(state=30 * GIB, resting=24 * GIB, process=1 * GIB, converting=10 * GIB)
ENGINE = Memory(state=4 * GIB, process=2 * GIB)


def parts(memory_of: Mapping[str, Memory], mode: Mode, *, gpus: float = 1.0) -> dict[str, dict[str, float]]:
    """GiB by phase and role, of two actors of each role."""
    demands = [Demand(role, 2, 1.0, gpus) for role in memory_of]
    plan = place(demands, [Node("a", 64.0, 8.0 if gpus else 0.0)], mode=mode)
    turns = in_turn(memory_of, mode)
    found = host_peaks(plan.slots, memory_of, in_turn=turns, bucket_bytes=0.5 * GIB)
    return {peak.phase: {role: size / GIB for role, size in peak.parts.items() if role != "Ray"} for peak in found}


def test_ranks_that_share_gpus_convert_at_the_start_and_rest_afterwards() -> None:
    found = parts({"policy": POLICY, "rollout": ENGINE}, "colocated")
    assert found[START] == {"policy": 2 * (1 + 10), "rollout": 2 * 2}
    assert found[WHOLE_STEP] == {"policy": 2 * (1 + 24), "rollout": 2 * (2 + 4)}
    assert found[PUBLISH] == {**found[WHOLE_STEP], "buckets": 2 * 0.5}


@pytest.mark.parametrize(("mode", "policy"), [("separate", 1), ("mixed", 1 + 24)])
def test_engines_with_gpus_of_their_own_never_keep_weights_on_the_host(mode: Mode, policy: float) -> None:
    found = parts({"policy": POLICY, "rollout": ENGINE}, mode)
    assert found[WHOLE_STEP] == {"policy": 2 * policy, "rollout": 2 * 2}


def test_an_offloaded_optimizer_comes_after_the_weights_that_were_converted() -> None:
    policy = replace(POLICY, offloaded=7 * GIB, resting=3 * GIB)
    found = parts({"policy": policy, "rollout": ENGINE}, "colocated")
    assert found[START]["policy"] == 2 * (1 + 10)
    assert found[WHOLE_STEP]["policy"] == 2 * (1 + 7 + 3)


def test_on_a_cpu_zero_3_has_all_weights_before_it_divides_them() -> None:
    policy = Memory(state=3 * GIB, working=1 * GIB, moments=2 * GIB, loading=9 * GIB, process=1 * GIB)
    found = parts({"policy": policy}, "colocated", gpus=0.0)
    assert found[START] == {"policy": 2 * (1 + 9)}
    assert found[WHOLE_STEP] == {"policy": 2 * (1 + 3 + 1)}


def test_ray_and_the_coordinator_are_there_in_all_phases() -> None:
    found = host_peaks([], {}, in_turn=(), has_coordinator=True)
    assert {peak.total for peak in found} == {RAY_PROCESSES + COORDINATOR_PROCESS}


@pytest.mark.parametrize(("stored", "converting"), [("bfloat16", 0), ("float32", 2 * 1000), (None, 2 * 1000)])
def test_only_files_of_another_type_are_converted_in_memory_of_each_rank(stored: str | None, converting: int) -> None:
    size = replace(SIZE, stored=stored)
    policy = learner_memory(
        size, Sharding("bfloat16", 3, 8), micro_batch_tokens=5, gradient_checkpointing=True, logits=True
    )
    reference = scorer_memory(size, dtype="bfloat16", shards=8, micro_batch_tokens=5, logits=True)
    assert (policy.converting, reference.converting) == (converting, converting)


def test_the_start_of_a_sharded_model_of_fp32_files_is_the_fullest_phase() -> None:
    """8 ranks of 7.6 billion parameters: 15.2 GB each while they load, 17.1 GB of states that rest for all of them."""
    size = replace(SIZE, num_params=7_600_000_000, stored="float32")
    memory_of = {
        "policy": learner_memory(
            size, Sharding("bfloat16", 3, 8), micro_batch_tokens=5, gradient_checkpointing=True, logits=True
        ),
        "reference": scorer_memory(size, dtype="bfloat16", shards=8, micro_batch_tokens=5, logits=True),
    }
    plan = place([Demand(role, 8, 1.0, 1.0) for role in memory_of], [Node("a", 64.0, 8.0)], mode="colocated")
    peak = highest(host_peaks(plan.slots, memory_of, in_turn=in_turn(memory_of, "colocated")))
    assert peak.phase == START
    assert peak.total == pytest.approx(RAY_PROCESSES + 8 * (LEARNER_PROCESS + SCORER_PROCESS + 2 * 15.2e9))
