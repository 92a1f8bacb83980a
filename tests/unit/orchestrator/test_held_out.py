"""Reports of an evaluation about held-out responses without a score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.held_out import Evaluation
from orchestrator.roles import Roles
from orchestrator.types import EvaluatedShard, Metrics, Sampling, State
from orchestrator.watching.telemetry import Telemetry, read_lines
from tests.unit.orchestrator.fakes import Diary, FakeLearner, FakePublisher, FakeRecorder, FakeRollouts, FakeSchedule


@dataclass
class FailingRecorder(FakeRecorder):
    num_failed: int = 0

    async def evaluate(self, shards: Sequence[EvaluatedShard], *, file: str) -> Metrics:
        return {**await super().evaluate(shards, file=file), "evaluation/failed": float(self.num_failed)}


async def evaluated(folder: Path, num_failed: int) -> list[str]:
    """The console lines."""
    said: list[str] = []
    diary = Diary()
    scorer = FakeLearner("scorer", diary)
    rollouts = FakeRollouts(diary, version=0)
    evaluation = Evaluation(
        folder / "evaluation",
        FakeSchedule(8).requests(-1),
        roles=Roles(
            rollouts=rollouts,
            policy=scorer,
            reference=scorer,
            reward=scorer,
            recorder=FailingRecorder(diary, num_failed=num_failed),
            publisher=FakePublisher(diary, rollouts),
        ),
        telemetry=Telemetry(folder, "run", 1, console=said.append),
        sampling=Sampling(),
        samples_per_shard=4,
        every_steps=0,
        last_step=4,
    )
    await evaluation.run_if_due(State(0, 0.1))
    return said


async def test_failed_scores_are_counted_and_told_with_the_place_of_the_reasons(tmp_path: Path) -> None:
    said = await evaluated(tmp_path, num_failed=3)
    reasons = tmp_path / "evaluation" / "failed-step-000000.jsonl"
    assert said == [
        f"WARNING evaluation of version 0: 3 of 8 held-out responses have no score and are left out; {reasons} says why"
    ]
    (event,) = read_lines(tmp_path / "events.jsonl")
    assert (event["kind"], event["version"], event["failed"]) == ("evaluation_failures", 0, 3)
    (line,) = read_lines(tmp_path / "metrics.jsonl")
    assert line["metrics"]["evaluation/failed"] == 3.0


async def test_nothing_is_told_where_nothing_failed(tmp_path: Path) -> None:
    assert await evaluated(tmp_path, num_failed=0) == []
    assert not (tmp_path / "events.jsonl").exists()
