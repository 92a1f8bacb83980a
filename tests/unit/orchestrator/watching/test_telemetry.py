from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import StorageError
from orchestrator.watching.telemetry import Telemetry, clock_text, read_lines
from tests.deadlines import scaled


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class RecordingTracker:
    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.is_closed = False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.logged.append((step, dict(metrics)))

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(tmp_path: Path, clock: Clock) -> Callable[..., Telemetry]:
    def build(**options: Any) -> Telemetry:
        return Telemetry(tmp_path, "demo-1", 1, clock=clock, wall_clock=lambda: 5.0, **options)

    return build


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run_step(telemetry: Telemetry, clock: Clock, step: int, seconds: float = 2.0, **metrics: float) -> None:
    with telemetry.step(step) as record:
        clock.now += seconds
        record({name.replace("__", "/"): value for name, value in metrics.items()})


def test_a_clean_step_writes_one_line_and_tells_the_trackers(make, clock, tmp_path):
    tracker = RecordingTracker()
    telemetry = make(trackers=[tracker])
    with telemetry.step(0) as record:
        record({"reward/mean": 0.25})
        record({"policy/loss": 1})
        clock.now += 4.0
    (line,) = lines(tmp_path)
    assert {key: line[key] for key in ("stage", "kind", "step", "attempt", "time")} == {
        "stage": "rl",
        "kind": "step",
        "step": 0,
        "attempt": 1,
        "time": 5.0,
    }
    assert line["metrics"]["reward/mean"] == 0.25
    assert line["metrics"]["policy/loss"] == 1.0
    assert line["metrics"]["time/step_s"] == 4.0
    assert line["metrics"]["memory/coordinator_rss_bytes"] > 1e6
    assert tracker.logged == [(0, line["metrics"])]


def test_after_an_exception_nothing_is_written(make, clock, tmp_path):
    tracker = RecordingTracker()
    telemetry = make(trackers=[tracker])
    with pytest.raises(RuntimeError, match="engine"), telemetry.step(0) as record:
        record({"reward/mean": 0.25})
        raise RuntimeError("engine")
    assert not (tmp_path / "metrics.jsonl").exists()
    assert tracker.logged == []


def test_non_finite_values_become_null_and_are_counted(make, clock, tmp_path):
    tracker = RecordingTracker()
    run_step(make(trackers=[tracker]), clock, 0, reward__mean=math.nan, policy__loss=math.inf, policy__entropy=2.0)
    metrics = lines(tmp_path)[0]["metrics"]
    assert metrics["reward/mean"] is None
    assert metrics["policy/loss"] is None
    assert metrics["telemetry/non_finite"] == 2.0
    assert "reward/mean" not in tracker.logged[0][1]
    assert tracker.logged[0][1]["policy/entropy"] == 2.0


def test_a_value_that_is_no_number_is_refused(make, clock):
    with pytest.raises(ValueError, match="high"), make().step(0) as record:
        record({"reward/mean": "high"})


def test_overlapping_tasks_of_one_phase_count_wall_time_once(make, clock, tmp_path):
    telemetry = make()

    async def task(enter_at: float, leave_at: float, order: list[tuple[float, asyncio.Event]]) -> None:
        enter, leave = asyncio.Event(), asyncio.Event()
        order += [(enter_at, enter), (leave_at, leave)]
        await enter.wait()
        with telemetry.phase("score"):
            await leave.wait()

    async def drive() -> None:
        order: list[tuple[float, asyncio.Event]] = []
        tasks = [asyncio.create_task(task(*span, order)) for span in ((0.0, 3.0), (1.0, 5.0), (7.0, 8.0))]
        await asyncio.sleep(0)
        start = clock.now
        for at, event in sorted(order, key=lambda item: item[0]):
            clock.now = start + at
            event.set()
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)

    with telemetry.step(0):
        asyncio.run(drive())
    assert lines(tmp_path)[0]["metrics"]["time/score_s"] == 6.0  # 0..5 and 7..8
    assert lines(tmp_path)[0]["metrics"]["time/step_s"] == 8.0


def test_phases_nest_and_repeat(make, clock, tmp_path):
    telemetry = make()
    with telemetry.step(0):
        for _ in range(2):
            with telemetry.phase("learn"):
                clock.now += 1.0
                with telemetry.phase("save"):
                    clock.now += 0.5
    metrics = lines(tmp_path)[0]["metrics"]
    assert (metrics["time/learn_s"], metrics["time/save_s"]) == (3.0, 1.0)


def test_a_phase_that_outlives_its_step_is_split_between_the_lines(make, clock, tmp_path):
    telemetry = make()
    with telemetry.step(0):
        phase = telemetry.phase("generate")
        phase.__enter__()
        clock.now += 2.0
    clock.now += 1.0
    with telemetry.step(1):
        clock.now += 4.0
        phase.__exit__(None, None, None)
    seconds = [line["metrics"]["time/generate_s"] for line in lines(tmp_path)]
    assert seconds == [2.0, 5.0]


def test_a_phase_that_fails_still_counts(make, clock, tmp_path):
    telemetry = make()
    with telemetry.step(0), pytest.raises(OSError, match="disk"), telemetry.phase("save"):
        clock.now += 1.0
        raise OSError("disk")
    assert lines(tmp_path)[0]["metrics"]["time/save_s"] == 1.0


def test_idle_share_is_what_is_left_of_the_step(make, clock, tmp_path):
    telemetry = make()
    with telemetry.step(0) as record:
        clock.now += 10.0
        record({"busy/policy_s": 2.0, "busy/rollout_s": 11.0})
        record({"busy/policy_s": 1.5})
    metrics = lines(tmp_path)[0]["metrics"]
    assert metrics["busy/policy_s"] == 3.5
    assert metrics["idle/policy"] == pytest.approx(0.65)
    assert metrics["idle/rollout"] == 0.0


def test_token_rates_and_totals_follow_from_what_was_recorded(make, clock, tmp_path):
    telemetry = make()
    for step in range(2):
        with telemetry.step(step) as record:
            with telemetry.phase("generate"):
                clock.now += 4.0
            record({"tokens/generated": 1000, "tokens/learned": 1000})
    metrics = lines(tmp_path)[1]["metrics"]
    assert metrics["tokens/generated_per_s"] == 250.0
    assert "tokens/learned_per_s" not in metrics  # there was no separate learn phase
    assert metrics["tokens/total"] == 2000.0


def test_rewinding_drops_undone_steps_and_later_evaluations_only(make, clock, tmp_path):
    other = make(stage="reward_model")
    run_step(other, clock, 7, reward_model__loss=0.5)
    telemetry = make()
    telemetry.evaluation(0, {"evaluation/gold_mean": 0.1})
    for step in range(4):
        run_step(telemetry, clock, step, tokens__generated=10.0)
        telemetry.evaluation(step + 1, {"evaluation/gold_mean": 0.1 * step})
    telemetry.rewind(2)
    kept = [(line["stage"], line["kind"], line["step"]) for line in lines(tmp_path)]
    assert kept == [
        ("reward_model", "step", 7),
        ("rl", "evaluation", 0),
        ("rl", "step", 0),
        ("rl", "evaluation", 1),
        ("rl", "step", 1),
        ("rl", "evaluation", 2),
    ]
    run_step(telemetry, clock, 2, tokens__generated=10.0)
    assert lines(tmp_path)[-1]["metrics"]["tokens/total"] == 30.0


def test_a_resumed_run_doubles_nothing(make, clock, tmp_path):
    first = make()
    for step in range(5):
        run_step(first, clock, step, reward__mean=float(step))
    second = make()
    second.rewind(3)
    for step in range(3, 6):
        run_step(second, clock, step, reward__mean=10.0 + step)
    assert [line["step"] for line in lines(tmp_path)] == list(range(6))
    assert lines(tmp_path)[3]["metrics"]["reward/mean"] == 13.0


def test_an_evaluation_of_the_same_version_replaces_the_older_one(make, clock, tmp_path):
    telemetry = make()
    telemetry.evaluation(0, {"evaluation/gold_mean": 0.1})
    telemetry.evaluation(0, {"evaluation/gold_mean": 0.2})
    assert [line["metrics"]["evaluation/gold_mean"] for line in lines(tmp_path)] == [0.2]


def test_a_torn_last_line_of_a_killed_attempt_is_cut_off(make, clock, tmp_path):
    run_step(make(), clock, 0)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"stage": "rl", "ki')
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 1
    run_step(make(), clock, 1)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1]


def test_a_damaged_line_in_the_middle_is_named(make, clock, tmp_path):
    run_step(make(), clock, 0)
    path = tmp_path / "metrics.jsonl"
    path.write_text("not json\n" + path.read_text())
    with pytest.raises(StorageError, match=r"metrics\.jsonl:1 is damaged"):
        make()


def test_text_with_unicode_line_separators_survives(make, tmp_path):
    make().event("note", text="a\u2028b\nc")
    (line,) = read_lines(tmp_path / "events.jsonl")
    assert line["text"] == "a\u2028b\nc"


def test_events_carry_time_attempt_stage_and_fields(make, tmp_path):
    telemetry = make(stage="reward_model")
    telemetry.event("stage_started")
    telemetry.event("stage_finished", held_out_accuracy=0.7)
    first, second = read_lines(tmp_path / "events.jsonl")
    assert first == {"time": 5.0, "attempt": 1, "stage": "reward_model", "kind": "stage_started"}
    assert second["held_out_accuracy"] == 0.7


def test_a_folder_that_is_gone_is_a_storage_error(make, clock, tmp_path):
    telemetry = Telemetry(tmp_path / "gone", "demo-1", 1, clock=clock)
    with pytest.raises(StorageError, match="metrics.jsonl can't be written"):
        run_step(telemetry, clock, 0)


def test_the_line_for_people(make, clock):
    shown: list[str] = []
    telemetry = make(console=shown.append, num_steps=20)
    for step, (reward, seconds) in enumerate([(0.32, 24.0), (0.4, 300.0), (0.53, 24.1)]):
        with telemetry.step(step) as record:
            with telemetry.phase("generate"):
                clock.now += 10.0
            clock.now += seconds - 10.0
            numbers = {"reward/mean": reward, "kl/per_response": 1.2, "response/length_mean": 31.2}
            record({**numbers, "tokens/generated": 8120})
    assert shown[0] == "rl 1/20  reward 0.32  KL 1.2  len 31  812 tok/s  24.0 s/step  7:36 left"
    assert shown[2] == "rl 3/20  reward 0.53 (+0.21)  KL 1.2  len 31  812 tok/s  24.1 s/step  6:50 left"


def test_progress_after_a_resume_compares_with_the_first_step_of_the_run(make, clock):
    run_step(make(), clock, 0, reward__mean=0.5)
    shown: list[str] = []
    run_step(make(console=shown.append, num_steps=2), clock, 1, reward__mean=0.75)
    assert shown == ["rl 2/2  reward 0.75 (+0.25)  2.0 s/step"]


def test_closing_closes_the_trackers(make):
    tracker = RecordingTracker()
    with make(trackers=[tracker]):
        assert not tracker.is_closed
    assert tracker.is_closed


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (61, "1:01"), (3599.6, "1:00:00"), (3725, "1:02:05")])
def test_clock_text(seconds, text):
    assert clock_text(seconds) == text


def test_importing_telemetry_stays_light():
    heavy = ["matplotlib", "torch", "ray", "vllm", "deepspeed", "transformers", "tensorboard", "pyarrow"]
    code = (
        f"import sys, orchestrator.watching.telemetry; sys.exit(', '.join(m for m in {heavy} if m in sys.modules) or 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=scaled(60), check=False
    )
    assert result.returncode == 0, result.stderr


def test_now_tells_stage_step_and_how_long_phases_are_open_across_steps(make, clock):
    telemetry = make()
    assert telemetry.now() == {"stage": "rl", "step": None, "phases": {}, "people": None}
    with telemetry.phase("generate"):
        run_step(telemetry, clock, 3)
        clock.now += 1.0
        with telemetry.phase("save"):
            clock.now += 0.5
            assert telemetry.now()["step"] == 3 and telemetry.now()["phases"] == {"generate": 3.5, "save": 0.5}
    assert telemetry.now()["phases"] == {}
