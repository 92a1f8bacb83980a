"""A run is a fold over its log: the log is sufficient to reproduce every later state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from orchestrator.coordinator import Relearning
from orchestrator.errors import GuardTripped, RoleDied
from orchestrator.roles import Learners
from orchestrator.run.experience_log import ExperienceLog
from orchestrator.types import State
from orchestrator.watching.guards import Guard, Guards, only_warning
from orchestrator.watching.telemetry import Telemetry, read_lines
from tests.unit.orchestrator.fakes import Diary, FakeLearner, FakeRecorder
from tests.unit.orchestrator.test_coordinator import World


def relearning(run: Path, to: Path, *, steps: int, warmup: int = 0, table: Sequence[Guard] = ()) -> Relearning:
    to.mkdir()
    diary = Diary()
    log = ExperienceLog(run / "log", FakeRecorder(diary), max_failed_fraction=0.1)
    telemetry = Telemetry(to, "run", 0, stage="replay")
    return Relearning(
        steps=steps,
        critic_warmup_steps=warmup,
        next_kl_coefficient=lambda coefficient, kl, samples: 2 * coefficient,
        roles=Learners(policy=FakeLearner("policy", diary), critic=FakeLearner("critic", diary)),
        log=log,
        guards=Guards(table, folder=to, telemetry=telemetry, past=log.metrics, console=print),
        telemetry=telemetry,
    )


async def test_without_engines_the_log_gives_every_state_of_the_run(tmp_path: Path) -> None:
    world = World(tmp_path / "run", critic_warmup_steps=1)
    world.folder.mkdir()
    final = await world.coordinator().run(State(0, 0.1))
    for until in (1, 3, 4):
        again = relearning(tmp_path / "run", tmp_path / f"to-{until}", steps=until, warmup=1)
        state = await again.relearn(State(0, 0.1))
        assert state == State(until, 0.1 * 2**until)
        assert again.roles.policy.learned == world.policy.learned[: until - 1]
        assert again.roles.critic.learned == world.critic.learned[:until]
    assert state == final


async def test_it_ends_where_the_log_ends(tmp_path: Path) -> None:
    world = World(tmp_path / "run", fail_in_step=2)
    world.folder.mkdir()
    with pytest.raises(RoleDied):
        await world.coordinator().run(State(0, 0.1))
    assert await relearning(tmp_path / "run", tmp_path / "to", steps=4).relearn(State(0, 0.1)) == State(2, 0.4)


async def test_a_guard_that_ended_the_run_only_warns_in_its_replay(tmp_path: Path) -> None:
    table = [Guard("kl", "kl/per_response", "stop", maximum=1e-3)]
    world = World(tmp_path / "run", table=table)
    world.folder.mkdir()
    with pytest.raises(GuardTripped):
        await world.coordinator().run(State(0, 0.1))
    again = relearning(tmp_path / "run", tmp_path / "to", steps=4, table=only_warning(table))
    assert await again.relearn(State(0, 0.1)) == State(1, 0.2)
    assert [event["action"] for event in read_lines(tmp_path / "to" / "events.jsonl")] == ["warn"]


async def test_a_run_that_died_before_its_last_checkpoint_saves_it_when_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path)

    async def dies(learner: FakeLearner, folder: Path) -> None:
        raise RoleDied("policy", 0, "save", "killed by the test")

    with monkeypatch.context() as patch:
        patch.setattr(FakeLearner, "save", dies)
        with pytest.raises(RoleDied):
            await world.coordinator().run(State(0, 0.1))
    coordinator = world.coordinator()
    assert await coordinator.run(State(0, 0.1)) == State(4, 1.6)
    assert [path.name for path in coordinator.checkpoints.complete()] == ["step-000004"]
    assert world.diary.of("evaluate") == [0, 4]
