"""The whole loop with fakes: properties of every run, independent of the roles."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.coordinator import Coordinator
from orchestrator.errors import RewardError, RoleDied, StorageError
from orchestrator.evaluation import EVALUATION, evaluation_metrics
from orchestrator.failures import Unsupervised
from orchestrator.held_out import Evaluation
from orchestrator.roles import NoCritic, Roles
from orchestrator.run.checkpoints import Checkpoints
from orchestrator.run.experience_log import ExperienceLog
from orchestrator.sampler import Sampler
from orchestrator.turns import InTurn, SharedGpus, Unshared
from orchestrator.types import EvaluatedShard, Metrics, Sampling, State
from orchestrator.watching.guards import Guard, Guards, acted_before
from orchestrator.watching.telemetry import Telemetry, read_lines
from tests.deadlines import scaled
from tests.unit.orchestrator.fakes import (
    Diary,
    FakeLearner,
    FakePublisher,
    FakeRecorder,
    FakeRollouts,
    FakeSchedule,
)


@dataclass
class World:
    """One run's parts; call `coordinator()` once per attempt."""

    folder: Path
    steps: int = 4
    max_staleness: int = 0
    takes_turns: bool = False
    shares_gpus: bool = False
    samples_again: bool = False
    every_steps: int = 0
    critic_warmup_steps: int = 0
    needs_critic: bool = True
    table: Sequence[Guard] = ()
    poll_s: float = 0.001
    num_dropped: int = 0
    max_failed_fraction: float = 0.1
    sums_of_step: Mapping[int, Metrics] = field(default_factory=dict)
    policy_metrics: Mapping[int, Metrics] = field(default_factory=dict)
    diary: Diary = field(default_factory=Diary)
    fail_in_step: int | None = None
    said: list[str] = field(default_factory=list)
    evaluate_every: int = 0
    recorder: type[FakeRecorder] = FakeRecorder

    def coordinator(self) -> Coordinator:
        diary = self.diary
        self.policy = FakeLearner("policy", diary, metrics_of_step=self.policy_metrics)
        self.critic = FakeLearner("critic", diary)
        rollouts = FakeRollouts(diary, fail_in_step=self.fail_in_step)
        recorder = self.recorder(diary, self.num_dropped, self.sums_of_step)
        telemetry = Telemetry(self.folder, "run", 1)
        scorers = {name: FakeLearner(name, diary) for name in ("reference", "reward")}
        learners = {"policy": self.policy, **({"critic": self.critic} if self.needs_critic else {})}
        shared = SharedGpus(rollouts, learners, scorers, samples_again=self.samples_again)
        turns = shared if self.shares_gpus else Unshared()
        critic = self.critic if self.needs_critic else NoCritic()
        schedule = FakeSchedule(8)
        sampling = Sampling()
        roles = Roles(
            policy=InTurn(self.policy, "policy", turns) if self.shares_gpus else self.policy,
            critic=InTurn(critic, "critic", turns) if self.shares_gpus and self.needs_critic else critic,
            rollouts=rollouts,
            **scorers,
            recorder=recorder,
            publisher=FakePublisher(diary, rollouts),
        )
        log = ExperienceLog(self.folder / "log", recorder, max_failed_fraction=self.max_failed_fraction)
        return Coordinator(
            steps=self.steps,
            critic_warmup_steps=self.critic_warmup_steps,
            next_kl_coefficient=lambda coefficient, kl, samples: 2 * coefficient,
            sampler=Sampler(
                rollouts,
                schedule,
                sampling=sampling,
                samples_per_shard=4,
                max_staleness=self.max_staleness,
                takes_turns=self.takes_turns,
                turns=turns,
            ),
            roles=roles,
            log=log,
            guards=Guards(
                self.table,
                folder=self.folder,
                telemetry=telemetry,
                past=log.metrics,
                console=self.said.append,
                acted=acted_before(self.folder),
                poll_s=self.poll_s,
            ),
            checkpoints=Checkpoints(
                self.folder / "checkpoints",
                roles.by_role,
                every_steps=self.every_steps,
                last_step=self.steps,
                keep=2,
            ),
            evaluation=Evaluation(
                self.folder / "evaluation",
                schedule.requests(-1),
                roles=roles,
                telemetry=telemetry,
                sampling=sampling,
                samples_per_shard=4,
                every_steps=self.evaluate_every,
                last_step=self.steps,
                turns=turns,
            ),
            turns=turns,
            telemetry=telemetry,
            meter=_no_meter,
            supervisor=Unsupervised(),
        )


async def _no_meter(version: int) -> Metrics:
    return {"busy/policy_s": 0.0}


async def test_a_run_learns_every_step_once_and_publishes_every_version(tmp_path: Path) -> None:
    world = World(tmp_path)
    state = await world.coordinator().run(State(0, 0.1))
    assert state == State(4, 1.6)
    assert world.policy.learned == world.critic.learned == [0, 1, 2, 3]
    assert world.diary.of("publish") == [0, 1, 2, 3, 4]
    assert world.diary.of("evaluate") == [0, 4]
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl") if line["kind"] == "step"] == [0, 1, 2, 3]


async def test_experience_is_committed_before_it_is_learned_from(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.coordinator().run(State(0, 0.1))
    for step in range(world.steps):
        recorded = world.diary.entries.index(("record", step))
        assert recorded < world.diary.entries.index(("learn policy", step))
        assert (tmp_path / "log" / f"step-{step:06d}" / "manifest.json").exists()


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
async def test_rollouts_never_lag_more_than_max_staleness(tmp_path: Path, max_staleness: int) -> None:
    world = World(tmp_path, steps=6, max_staleness=max_staleness)
    await world.coordinator().run(State(0, 0.1))
    version = -1
    lags = []
    for what, number in world.diary.entries:
        if what == "publish":
            version = number
        elif what == "generate" and 0 <= number < version + 10:
            lags.append(number - version)
    assert max(lags) <= max_staleness
    if max_staleness:
        assert max(lags) == max_staleness, "sampling never ran ahead"


async def test_a_failure_ends_the_run_with_its_own_error_and_leaves_the_log_whole(tmp_path: Path) -> None:
    world = World(tmp_path, fail_in_step=2)
    with pytest.raises(RoleDied, match="rollout rank 0 failed in 'generate'"):
        await world.coordinator().run(State(0, 0.1))
    assert world.policy.learned == [0, 1]
    assert not (tmp_path / "log" / "step-000002" / "manifest.json").exists()


async def test_a_run_that_failed_goes_on_from_its_log_and_samples_nothing_twice(tmp_path: Path) -> None:
    world = World(tmp_path, fail_in_step=2)
    with pytest.raises(RoleDied):
        await world.coordinator().run(State(0, 0.1))
    world.fail_in_step = None
    state = await world.coordinator().run(State(0, 0.1))
    assert state == State(4, 1.6)
    assert world.policy.learned == [0, 1, 2, 3]
    assert [world.diary.of("generate").count(step) for step in range(4)] == [2 + 2, 2, 2, 2]  # step 0: evaluation too
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl") if line["kind"] == "step"] == [0, 1, 2, 3]


async def test_a_checkpoint_saves_learning_again(tmp_path: Path) -> None:
    world = World(tmp_path, fail_in_step=3, every_steps=2)
    with pytest.raises(RoleDied):
        await world.coordinator().run(State(0, 0.1))
    world.fail_in_step = None
    before = len(world.diary.of("learn policy"))
    await world.coordinator().run(State(0, 0.1))
    assert world.diary.of("learn policy")[before:] == [2, 3]
    assert world.policy.learned == [0, 1, 2, 3]


@pytest.mark.parametrize("step", range(4))
async def test_a_run_that_fails_in_any_step_resumes_from_the_checkpoint_before_it(tmp_path: Path, step: int) -> None:
    world = World(tmp_path, fail_in_step=step, every_steps=1)
    with pytest.raises(RoleDied):
        await world.coordinator().run(State(0, 0.1))
    world.fail_in_step = None
    before = len(world.diary.of("learn policy"))
    assert await world.coordinator().run(State(0, 0.1)) == State(4, 1.6)
    assert world.policy.learned == world.critic.learned == [0, 1, 2, 3]
    assert world.diary.of("learn policy")[before:] == list(range(step, 4))


async def test_only_the_critic_learns_while_it_warms_up(tmp_path: Path) -> None:
    world = World(tmp_path, critic_warmup_steps=2)
    await world.coordinator().run(State(0, 0.1))
    assert world.policy.learned == [2, 3]
    assert world.critic.learned == [0, 1, 2, 3]


async def test_a_run_without_a_critic_learns_and_saves_the_policy_alone(tmp_path: Path) -> None:
    world = World(tmp_path, needs_critic=False)
    await world.coordinator().run(State(0, 0.1))
    assert world.policy.learned == [0, 1, 2, 3]
    assert world.critic.learned == []
    assert sorted(path.name for path in (tmp_path / "checkpoints" / "step-000004").iterdir() if path.is_dir()) == [
        "policy"
    ]
    names = {name for line in read_lines(tmp_path / "metrics.jsonl") for name in line.get("metrics", {})}
    assert any(name.startswith("policy/") for name in names)
    assert not any(name.startswith("critic/") for name in names - {"critic/explained_variance"})


async def test_too_many_failed_rewards_stop_the_run(tmp_path: Path) -> None:
    world = World(tmp_path, num_dropped=2)
    with pytest.raises(RewardError, match="4 of 8 samples failed"):
        await world.coordinator().run(State(0, 0.1))


def test_the_loop_runs_in_a_second_without_ray_or_torch() -> None:
    """In a process in which their imports fail."""
    started = time.monotonic()
    program = (
        "import sys\n"
        "for name in ('ray', 'torch', 'vllm', 'deepspeed', 'transformers'): sys.modules[name] = None\n"
        "import asyncio, pathlib, tempfile, time\n"
        "from tests.unit.orchestrator.test_coordinator import World\n"
        "from orchestrator.types import State\n"
        "from tests.deadlines import scaled\n"
        "folder = pathlib.Path(tempfile.mkdtemp())\n"
        "started = time.perf_counter()\n"
        "world = World(folder, steps=20)\n"
        "state = asyncio.run(world.coordinator().run(State(0, 0.1)))\n"
        "assert state.step == 20 and world.policy.learned == list(range(20))\n"
        "assert time.perf_counter() - started < scaled(1.0), time.perf_counter() - started\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=scaled(60), check=False
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < scaled(30)


@pytest.mark.parametrize("moment", ["generate", "score", "commit", "publish", "evaluate"])
async def test_a_stop_saves_where_the_run_stands(tmp_path: Path, moment: str) -> None:
    world = World(tmp_path, steps=3)
    coordinator = world.coordinator()
    running = asyncio.ensure_future(coordinator.run(State(0, 0.1)))
    await _until(coordinator.telemetry, moment, step=None if moment == "evaluate" else 2)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    saved = [path.name for path in coordinator.checkpoints.complete()]
    # During step 2's publish three steps are learned; the first evaluation is before any.
    assert saved == {"publish": ["step-000003"], "evaluate": []}.get(moment, ["step-000002"])
    again = world.coordinator()
    assert (await again.run(State(0, 0.1))).step == 3
    assert world.policy.learned == [0, 1, 2]


async def test_a_stop_while_learning_saves_nothing_half_learned(tmp_path: Path) -> None:
    world = World(tmp_path, steps=3)
    coordinator = world.coordinator()
    running = asyncio.ensure_future(coordinator.run(State(0, 0.1)))
    await _until(coordinator.telemetry, "learn", step=1)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert coordinator.checkpoints.complete() == []
    assert (await world.coordinator().run(State(0, 0.1))).step == 3


async def test_a_save_runs_beside_sampling_and_learning_waits_for_it(tmp_path: Path) -> None:
    world = World(tmp_path, steps=3, every_steps=1)
    coordinator = world.coordinator()
    world.policy.may_save.clear()
    running = asyncio.ensure_future(coordinator.run(State(0, 0.1)))
    await _until(coordinator.telemetry, "save", step=1)
    for _ in range(100):
        await asyncio.sleep(0)
    assert world.diary.of("generate")[-2:] == [1, 1]
    assert world.policy.learned == [0]
    assert coordinator.checkpoints.complete() == []
    world.policy.may_save.set()
    assert (await running).step == 3
    assert [path.name for path in coordinator.checkpoints.complete()] == ["step-000002", "step-000003"]
    saved = coordinator.checkpoints.complete()[0] / "policy" / "weights.txt"
    assert saved.read_text(encoding="utf-8") == "0,1"


async def test_a_stop_waits_for_the_save_that_was_begun(tmp_path: Path) -> None:
    world = World(tmp_path, steps=3, every_steps=1)
    coordinator = world.coordinator()
    world.policy.may_save.clear()
    running = asyncio.ensure_future(coordinator.run(State(0, 0.1)))
    await _until(coordinator.telemetry, "save", step=1)
    running.cancel()
    await asyncio.sleep(0)
    world.policy.may_save.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert [path.name for path in coordinator.checkpoints.complete()] == ["step-000001"]


async def test_a_save_that_fails_ends_the_run_before_anything_more_is_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path, steps=3, every_steps=1)
    coordinator = world.coordinator()

    async def full(folder: Path) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(world.policy, "save", full)
    with pytest.raises(StorageError, match="the disk is full"):
        await coordinator.run(State(0, 0.1))
    assert world.policy.learned == [0]


async def _until(telemetry: Telemetry, phase: str, *, step: int | None) -> None:
    """Yields until the phase of the step is open."""
    while not (phase in telemetry.now()["phases"] and telemetry.now()["step"] == step):  # noqa: ASYNC110  there is no event
        await asyncio.sleep(0)


async def test_a_damaged_step_whose_folder_is_deleted_as_advised_is_sampled_again_and_the_run_ends(
    tmp_path: Path,
) -> None:
    world = World(tmp_path)
    await world.coordinator().run(State(0, 0.1))
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "log" / "step-000001" / "manifest.json").write_text("{")
    with pytest.raises(StorageError, match=r"step-000001/manifest\.json is damaged.* delete its folder"):
        await world.coordinator().run(State(0, 0.1))
    shutil.rmtree(tmp_path / "log" / "step-000001")
    assert await world.coordinator().run(State(0, 0.1)) == State(4, 1.6)
    assert world.policy.learned == [0, 1, 2, 3]
    events = [event for event in read_lines(tmp_path / "events.jsonl") if event["kind"] == "set_aside"]
    assert [(event["lost_step"], event["steps"]) for event in events] == [(1, [2, 3])]


async def test_damaged_checkpoints_that_are_deleted_as_advised_are_learned_again(tmp_path: Path) -> None:
    world = World(tmp_path, every_steps=2)
    await world.coordinator().run(State(0, 0.1))
    folders = sorted((tmp_path / "checkpoints").iterdir())
    for folder in folders:
        (folder / "manifest.json").write_text("{")
    with pytest.raises(StorageError, match="no checkpoint can be trusted: .* With all of them deleted"):
        await world.coordinator().run(State(0, 0.1))
    for folder in folders:
        shutil.rmtree(folder)
    assert await world.coordinator().run(State(0, 0.1)) == State(4, 1.6)
    assert world.policy.learned == [0, 1, 2, 3]


class EvaluatingRecorder(FakeRecorder):
    """Writes real evaluation files with gold score version / 10."""

    async def evaluate(self, shards: Sequence[EvaluatedShard], *, file: str) -> Metrics:
        version = shards[0].rollout.step
        self.diary.note("evaluate", version)
        row = {"prompt_id": "p", "prompt_text": "p", "response_text": "r", "gold": version / 10, "kl": 1.0, "length": 3}
        table = pa.Table.from_pylist([{**row, "reward": None}], schema=EVALUATION)
        pq.write_table(table, file)
        return evaluation_metrics(table)


def _evaluations(folder: Path) -> dict[int, float]:
    lines = [line for line in read_lines(folder / "metrics.jsonl") if line["kind"] == "evaluation"]
    assert len({line["step"] for line in lines}) == len(lines)
    return {line["step"]: line["metrics"]["evaluation/gold_mean"] for line in lines}


@pytest.mark.parametrize("fails_in", [1, 2, 3, 4, 5])
async def test_no_evaluation_is_lost_or_made_twice_when_a_run_goes_on(tmp_path: Path, fails_in: int) -> None:
    world = World(tmp_path, steps=6, every_steps=4, evaluate_every=1, recorder=EvaluatingRecorder)
    world.fail_in_step = fails_in
    with pytest.raises(RoleDied):
        await world.coordinator().run(State(0, 0.1))
    world.fail_in_step = None
    await world.coordinator().run(State(0, 0.1))
    assert _evaluations(tmp_path) == {version: version / 10 for version in range(7)}
    assert world.diary.of("evaluate") == list(range(7))


async def test_an_evaluation_whose_line_a_death_took_is_written_again(tmp_path: Path) -> None:
    world = World(tmp_path, steps=3, evaluate_every=1, recorder=EvaluatingRecorder)
    world.fail_in_step = 2
    with pytest.raises(RoleDied):
        await world.coordinator().run(State(0, 0.1))
    lines = [line for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if '"evaluation"' not in line]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    world.fail_in_step = None
    await world.coordinator().run(State(0, 0.1))
    assert _evaluations(tmp_path) == {version: version / 10 for version in range(4)}
    assert world.diary.of("evaluate") == [0, 1, 2, 3]


async def test_evaluations_of_steps_that_the_log_lost_are_made_again(tmp_path: Path) -> None:
    world = World(tmp_path, steps=4, evaluate_every=1, recorder=EvaluatingRecorder)
    await world.coordinator().run(State(0, 0.1))
    shutil.rmtree(tmp_path / "checkpoints")
    shutil.rmtree(tmp_path / "log" / "step-000002")
    await world.coordinator().run(State(0, 0.1))
    assert world.diary.of("evaluate") == [0, 1, 2, 3, 4, 3, 4]
    assert _evaluations(tmp_path) == {version: version / 10 for version in range(5)}
