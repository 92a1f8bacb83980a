"""What the benchmark of learning reads from a run, and its interval."""

from __future__ import annotations

import pytest

from benchmarks.harness import interval
from benchmarks.lora_learning import FULL, LORA, Run, figures, run_of


def test_a_run_is_read_from_its_metrics() -> None:
    def step(reward: float, seconds: float) -> dict[str, object]:
        return {"kind": "step", "metrics": {"reward/mean": reward, "time/step_s": seconds}}

    def held_out(score: float, kl: float) -> dict[str, object]:
        return {"kind": "evaluation", "metrics": {"evaluation/gold_mean": score, "evaluation/kl_per_response": kl}}

    lines = [{"kind": "start"}, held_out(0.1, 0.0), step(0.2, 3.0), step(0.3, 5.0), held_out(0.5, 2.0)]
    found = run_of(lines)
    assert found == Run(0.1, 0.5, [0.2, 0.3], 2.0, 4.0) and found.gain == 0.4


def test_the_interval_is_students() -> None:
    # Mean 2, standard deviation 1, three values: 4.303 / √3 = 2.484.
    assert interval([1.0, 2.0, 3.0]) == "2.000 (95 %: -0.484 to 4.484)"
    assert interval([1.0]) == "1.000 (one seed: no interval)"


def test_gains_are_compared_by_seed() -> None:
    runs = {
        FULL: [Run(0.0, gain, [], 0.0, 1.0) for gain in (0.1, 0.3)],
        LORA: [Run(0.0, gain, [], 0.0, 1.0) for gain in (0.2, 0.2)],
    }
    *_, difference = figures(runs, "two steps")
    assert (difference.low, difference.high) == pytest.approx((-0.1, 0.1))
    assert difference.value == pytest.approx(0.0) and "mean 0.000 (95 %: -1.2" in difference.detail
