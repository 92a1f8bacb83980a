"""Which layouts are tried, which fit, and the errors of those that do not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.errors import CapacityError
from orchestrator.planning.costs import Dimensions, LearnSettings
from orchestrator.planning.hardware import DEVICES
from orchestrator.planning.peaks import CONTEXT, CUDA_GRAPHS, FRAGMENTATION, USABLE
from orchestrator.planning.simulation.fit import cache_tokens, memory_per_device
from orchestrator.planning.simulation.scenario import MODELS, Layout, Pool, Spread, Work
from orchestrator.planning.simulation.search import describe, layouts, search

H100 = DEVICES["h100"]
SMALL = Dimensions(494_032_768, 24, 896, 4864, 151_936, kv_width=128, tied=True)
LARGE = Dimensions(8_030_261_248, 32, 4096, 14336, 128_256, kv_width=1024, tied=False)
LEARNING = {**dict.fromkeys(MODELS, LearnSettings()), "reference": LearnSettings(0), "reward": LearnSettings(0)}


def work(size: Dimensions, **without: None) -> Work:
    return Work({**dict.fromkeys(MODELS, size), **without}, 128, Spread(100, 200), Spread(200, 400, 0.5))


def test_the_fastest_comes_first_and_everything_fits() -> None:
    found = search(work(SMALL), H100, 16, learning=LEARNING, dtype="bfloat16", staleness=1)
    seconds = [candidate.prediction.step_s for candidate in found.candidates]
    assert seconds == sorted(seconds)
    assert all(
        part.needed <= USABLE * part.available + 1 for candidate in found.candidates for part in candidate.memory
    )
    kinds = {(candidate.layout.mode, candidate.layout.max_staleness) for candidate in found.candidates}
    assert kinds == {("colocated", 0), ("mixed", 0), ("mixed", 1), ("separate", 0), ("separate", 1)}


def test_every_gpu_has_a_role_and_none_has_two_when_separate() -> None:
    for layout in layouts(work(SMALL), H100, 16, learning=LEARNING, widths=(1, 2)):
        assert layout.devices == 16
        assert sum(layout.devices_of(role) for role in ("rollout", *MODELS)) == 16 or layout.mode != "separate"


def test_a_reward_of_rules_takes_no_gpu() -> None:
    apart = [
        layout
        for layout in layouts(work(SMALL, reward=None), H100, 8, learning=LEARNING, widths=(1,))
        if layout.mode == "separate"
    ]
    assert apart and all(len(layout.pools) == 4 for layout in apart)


def test_too_large_a_model_is_refused_with_sizes_and_the_way_out() -> None:
    found = search(work(LARGE), H100, 1, learning=LEARNING, dtype="bfloat16", staleness=1)
    assert not found.candidates
    (reason,) = found.refused.values()
    assert "on one h100: start 100.0 GiB (policy 32.4, critic 32.4" in reason and "usable 68.5 GiB" in reason
    assert "Use more than 1 ranks of policy" in reason
    assert "offload" not in reason, "it was tried"


def test_a_model_that_needs_it_gets_zero_3_by_itself() -> None:
    found = search(work(LARGE), H100, 64, learning=LEARNING, dtype="bfloat16", staleness=1)
    assert found.candidates[0].layout.learning["policy"].zero_stage == 3


def test_optimizers_are_on_the_host_where_nothing_else_fits() -> None:
    """15 billion bytes of weights; the states of policy and critic are 18 bytes per parameter, 2 of them gradients."""
    size = replace(LARGE, num_params=7_600_000_000)
    found = search(work(size), H100, 2, learning=LEARNING, dtype="bfloat16", staleness=0)
    best = found.candidates[0].layout
    assert best.mode == "colocated"
    assert all(best.learning[role].offload_optimizer for role in ("policy", "critic"))
    assert not best.learning["reference"].offload_optimizer
    roomy = search(work(size), H100, 8, learning=LEARNING, dtype="bfloat16", staleness=0)
    assert not any(
        each.layout.learning["policy"].offload_optimizer for each in roomy.candidates if each.layout.takes_turns
    )


def test_models_that_are_whole_only_while_they_start_are_refused_with_a_way_out_that_helps() -> None:
    found = search(work(LARGE), H100, 2, learning=LEARNING, dtype="bfloat16", staleness=0)
    assert not found.candidates
    reason = found.refused["colocated, 2 engines of 1"]
    assert "start 68.6 GiB (policy 16.7, critic 16.7, reference 16.7, reward 16.7, rollout 1.8)" in reason
    assert "Use smaller models, GPUs of their own for some of these roles, or larger GPUs." in reason


def test_a_second_copy_of_weights_is_kept_where_the_ranks_allow_it() -> None:
    learner = LearnSettings(3, zero_hpz_partition_size=8)
    learning = {**LEARNING, "policy": learner, "critic": learner}
    found = search(work(SMALL), H100, 16, learning=learning, dtype="bfloat16", staleness=0)
    ranks = {each.layout.width("policy"): each.layout.learning["policy"] for each in found.candidates}
    assert {count: each.zero_hpz_partition_size for count, each in ranks.items()} == {
        count: 8 if count % 8 == 0 else 1 for count in ranks
    }


def test_roles_on_the_trunk_are_no_processes_of_their_own() -> None:
    learning = {**LEARNING, "policy": LearnSettings(adapters=1_000_000), "critic": LearnSettings(adapters=500_000)}
    layout = Layout(H100, (Pool(1, dict.fromkeys((*MODELS, "rollout"), 1)),), 1, 128, learning=learning)
    alone = replace(work(SMALL, critic=None, reference=None, reward=None))
    shared = replace(work(SMALL, reward=None), on_trunk=frozenset({"critic", "reference"}))
    (one,), (other,) = (memory_per_device(each, layout, dtype="bfloat16") for each in (alone, shared))
    assert one.roles == other.roles == ("policy", "rollout")
    policy = [next(peak.parts["policy"] for peak in each.peaks if peak.phase == "policy") for each in (one, other)]
    assert policy[1] - policy[0] == pytest.approx(500_000 * (2 + 2 + 4 + 4 + 8) * (1 + FRAGMENTATION))


def test_what_roles_leave_is_the_cache() -> None:
    pools = (Pool(1, {"rollout": 1}), Pool(8, dict.fromkeys(MODELS, 8)))
    layout = Layout(H100, pools, 1, 128, learning=LEARNING)
    memory = memory_per_device(work(SMALL), layout, dtype="bfloat16")
    logits, layer = 3 * 4 * 128 * SMALL.vocabulary, 2 * 16384 * (10 * SMALL.hidden + 4 * SMALL.feed_forward)
    left = USABLE * H100.memory_bytes - SMALL.weight_bytes - logits - layer - CONTEXT - CUDA_GRAPHS
    assert cache_tokens(work(SMALL), layout, memory) == pytest.approx(left / SMALL.cache_bytes_per_token)


def test_an_engine_that_is_too_narrow_is_told_to_widen() -> None:
    huge = replace(LARGE, num_params=40_000_000_000)
    layout = Layout(H100, (Pool(1, {"rollout": 1}), Pool(8, dict.fromkeys(MODELS, 8))), 1, 128, learning=LEARNING)
    with pytest.raises(CapacityError, match=r"rollout on one h100.*a higher rollout.tensor_parallel_size"):
        memory_per_device(work(huge), layout, dtype="bfloat16")


def test_a_layout_is_described_in_a_line() -> None:
    first = next(layouts(work(SMALL), H100, 16, learning=LEARNING, widths=(2,)))
    assert describe(first) == "colocated, 8 engines of 2"
    assert describe(replace(first, max_staleness=1)).endswith("staleness 1")
