from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from jobs.stages.work.reward_model import RewardModelResult
from orchestrator.config.loader import config_from_tree
from orchestrator.errors import CapacityError
from orchestrator.planning.demands import REWARD_MODEL, plan_training
from orchestrator.planning.placement import Node
from orchestrator.training.calibration import Calibration
from orchestrator.training.ensemble import Disagreement
from tests.deadlines import scaled


@pytest.mark.parametrize(
    ("ranks", "threads", "cpus", "expected"),
    [
        (1, None, [2], 2),
        (2, None, [2], 1),
        (2, None, [8, 8], 8),
        (3, None, [8, 8], 4),
        (2, 3, [8], 3),
        (1, None, [2.5], 2),
    ],
)
def test_threads_of_a_rank(ranks: int, threads: int | None, cpus: list[float], expected: int) -> None:
    nodes = [Node(f"10.0.0.{n}", count) for n, count in enumerate(cpus)]
    assert (
        plan_training(REWARD_MODEL, _config(ranks=ranks, cpus_per_rank=threads).reward_model, nodes).slots[0].threads
        == expected
    )


def test_too_many_workers_are_refused_before_anything_starts() -> None:
    with pytest.raises(CapacityError, match="reward_model wants 3"):
        plan_training(REWARD_MODEL, _config(ranks=3).reward_model, [Node("10.0.0.1", 2)])
    with pytest.raises(CapacityError, match="too few GPUs"):
        plan_training(REWARD_MODEL, _config(gpus_per_rank=1).reward_model, [Node("10.0.0.1", 2)])


def test_the_result_says_what_was_measured() -> None:
    text = _result(held_out_accuracy=0.625, interval=(0.5, 0.7), num_pairs=200, num_truncated=7).describe()
    assert "62.5% of 200 held-out pairs in order (95 %: 50.0% to 70.0%)" in text and "7 transcripts cut" in text
    assert "held-out" not in _result().describe()


def test_the_result_says_what_heads_do_alone() -> None:
    text = _result(heads=Disagreement([0.5, 0.625, None], 0.25, 0.5)).describe()
    assert "3 heads, alone 50.0% to 62.5% in order, disagreeing by 0.25 on right pairs and 0.5 on wrong pairs" in text
    assert "2 heads, 0 s" in _result(heads=Disagreement([None, None], None, None), seconds=0.0).describe()


def test_a_missing_preference_file_is_exit_code_2(tmp_path: Path) -> None:
    for arguments in (["preferences.path=/no/such.jsonl"], ["reward_model.epoch=2"]):
        done = subprocess.run(
            [sys.executable, "-m", "jobs", "reward-model", "stages=[reward_model]", f"run.root={tmp_path}", *arguments],
            capture_output=True,
            text=True,
            timeout=scaled(120),
            check=False,
        )
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr and "Error:" in done.stderr
    assert list(tmp_path.iterdir()) == []


def _config(**stage: object):  # type: ignore[no-untyped-def]
    return config_from_tree({"reward": {"path": "x"}, "reward_model": stage}, source="test")


def _result(**given: object) -> RewardModelResult:
    numbers = dict.fromkeys(("loss", "accuracy", "score_mean", "score_std", "seconds"), 0.5)
    counts = dict.fromkeys(("num_pairs", "num_records", "num_held_out", "num_truncated", "optimizer_steps"), 0)
    none: dict[str, object] = {"path": "m", "held_out_accuracy": None, "interval": (0.0, 1.0), "kendall_tau": None}
    none["calibration"] = Calibration([], None, None)
    return RewardModelResult(**(none | numbers | counts | given))  # type: ignore[arg-type]
