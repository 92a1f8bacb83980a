"""The parts of the figures of the pipelined loop."""

from __future__ import annotations

import pytest

from benchmarks.staleness import CONFIG, STALENESS, Step, figures, overrides, step_of
from orchestrator.config.loader import load_config


def test_scoring_is_what_remains_after_the_samples_are_there() -> None:
    metrics = {
        "time/step_s": 20.0,
        "busy/rollout_s": 9.0,
        "time/generate_s": 4.0,
        "time/score_s": 7.0,
        "time/learn_s": 11.0,
        "time/publish_s": 1.0,
    }
    assert step_of(metrics).score_s == pytest.approx(3.0)


def test_a_step_is_compared_with_the_longer_side_of_the_same_step() -> None:
    steps = {
        0: [Step(step_s=20, sample_s=10, score_s=2, learn_s=8, publish_s=0)],
        1: [Step(step_s=12, sample_s=10, score_s=2, learn_s=8, publish_s=0)],
    }
    on_policy, with_scoring, ahead, _ = figures(steps, max_new_tokens=28)
    assert (on_policy.value, with_scoring.value, ahead.value) == (2.0, 2.0, 1.2)
    assert (on_policy.met, ahead.met) == (None, False)


@pytest.mark.parametrize("staleness", STALENESS)
def test_its_runs_have_one_shard_per_step(staleness: int) -> None:
    config = load_config(CONFIG, overrides(staleness, 4, 28))
    assert config.samples_per_step <= config.rollout.shard_size
