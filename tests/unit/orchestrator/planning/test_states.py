"""Where a learner's bytes are: hand-worked, and their sum is what the memory plan counts."""

from __future__ import annotations

import pytest

from orchestrator.config.base import Dtype
from orchestrator.planning.memory import learned_bytes
from orchestrator.planning.states import learner_states


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 4])
def test_weights_and_states_are_all_that_is_planned(dtype: Dtype, zero_stage: int, ranks: int) -> None:
    found = learner_states(1000, dtype=dtype, zero_stage=zero_stage, ranks=ranks)
    assert found.on_device("learn") == pytest.approx(
        learned_bytes(1000, dtype=dtype, zero_stage=zero_stage, ranks=ranks)
    )
    for phase in ("learn", "score", "rest"):
        assert found.on_device(phase) + found.on_host(phase) == pytest.approx(found.on_device("learn"))
    assert found.on_device("rest") == 0 < found.on_device("score") < found.on_device("learn")


def test_seven_billion_on_eight_gpus() -> None:
    plain = learner_states(7.6e9, dtype="bfloat16", zero_stage=3, ranks=8)
    assert plain.weights == pytest.approx(2 * 7.6e9 / 8) and plain.states == pytest.approx(18 * 7.6e9 / 8)
    offloaded = learner_states(7.6e9, dtype="bfloat16", zero_stage=3, ranks=8, offloads=True)
    assert offloaded.states == pytest.approx(2 * 7.6e9 / 8) and offloaded.offloaded == pytest.approx(16 * 7.6e9 / 8)
    twice = learner_states(7.6e9, dtype="bfloat16", zero_stage=3, ranks=16, secondary=8)
    assert twice.weights == pytest.approx(2 * 7.6e9 * (1 / 16 + 1 / 8))


def test_a_frozen_trunk_is_weights_only() -> None:
    found = learner_states(100, 1000, dtype="bfloat16", zero_stage=1, ranks=2)
    assert found.weights == 2 * 1100 and found.states == 100 * (2 + 4 + 12 / 2)


def test_a_single_rank_in_fp32_that_offloads_has_master_weights_on_the_host() -> None:
    assert learner_states(100, dtype="float32", zero_stage=1, ranks=1).offloaded == 0
    assert learner_states(100, dtype="float32", zero_stage=1, ranks=1, offloads=True).offloaded == 100 * 12
