"""Every guard with every action, on fakes, and properties that hold over restarts."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.config import Config
from orchestrator.config.guards import GuardsConfig
from orchestrator.config.loader import config_from_tree
from orchestrator.errors import ConfigError, GuardTripped, RoleDied
from orchestrator.types import Metrics, State
from orchestrator.watching.guards import PAUSED_FILE, Guard, Guards, acted_before, guard_table
from orchestrator.watching.metrics import METRICS
from orchestrator.watching.telemetry import Telemetry, read_lines
from tests.deadlines import scaled
from tests.unit.orchestrator.test_coordinator import World

BAD = 3  # the step that trips a guard; each fake step has two shards of 4 samples of 5 tokens


@dataclass(frozen=True)
class Drill:
    """A guard's section, the bad step, and the reported value and bound."""

    guard: str
    section: Mapping[str, float]
    value: float
    bound: float
    sums: Mapping[str, float] = field(default_factory=dict)
    policy: Mapping[str, float] = field(default_factory=dict)

    def world(self, folder: Path, action: str, **settings: Any) -> World:
        return World(
            folder,
            steps=5,
            table=guard_table(GuardsConfig.model_validate({self.guard: {**self.section, "action": action}})),
            sums_of_step={**REWARDS, BAD: {**REWARDS[BAD], **self.sums}},
            policy_metrics={**dict.fromkeys(range(5), {"entropy": 2.0}), BAD: {"entropy": 2.0, **self.policy}},
            **settings,
        )


REWARDS = {step: {"reward_sum": 4.0 * (1 + step % 2)} for step in range(5)}  # means 1, 2, 1, 2, 1
DRILLS = [
    Drill("kl", {"max": 5}, 9, 5, sums={"kl_k1_token_sum": 36}),
    Drill("entropy", {"min": 0.5}, 0.25, 0.5, policy={"entropy": 0.25}),
    Drill("length", {"min": 3}, 2, 3, sums={"response_tokens": 8}),
    Drill("length", {"max": 8}, 12, 8, sums={"response_tokens": 48}),
    Drill("reward_jump", {"max": 3, "window": 3}, 4, 1 + 3 * math.sqrt(2) / 3, sums={"reward_sum": 16}),
    Drill("reward_jump", {"max": 3, "window": 3}, -4, 1 - 3 * math.sqrt(2) / 3, sums={"reward_sum": -16}),
    Drill("mismatch", {"max": 0.05}, 0.5, 0.05, sums={"mismatch_abs_token_sum": 10}),
]
every_guard = pytest.mark.parametrize("drill", DRILLS, ids=lambda drill: f"{drill.guard}-{'-'.join(drill.section)}")


def guard_events(folder: Path) -> list[dict[str, Any]]:
    return [event for event in read_lines(folder / "events.jsonl") if event["kind"] == "guard"]


async def until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(scaled(10)):
        while not happened():  # noqa: ASYNC110  files and the diary have no events
            await asyncio.sleep(0.001)


@every_guard
async def test_warn_tells_once_and_the_run_goes_on(tmp_path: Path, drill: Drill) -> None:
    world = drill.world(tmp_path, "warn")
    assert (await world.coordinator().run(State(0, 0.1))).step == 5
    (event,) = guard_events(tmp_path)
    assert (event["guard"], event["step"], event["action"]) == (drill.guard, BAD, "warn")
    assert (event["value"], event["bound"]) == pytest.approx((drill.value, drill.bound))
    (line,) = world.said
    assert line.startswith(f"guard: step {BAD}: {event['metric']} is {drill.value:.4g}; guards.{drill.guard}.")


@every_guard
async def test_stop_publishes_and_saves_nothing_of_the_step_and_stops_a_resume_again(
    tmp_path: Path, drill: Drill
) -> None:
    world = drill.world(tmp_path, "stop", every_steps=1)
    for attempt in (1, 2):
        with pytest.raises(GuardTripped, match=rf"step {BAD}: .* A resume .* stops here again") as caught:
            await world.coordinator().run(State(0, 0.1))
        assert caught.value.exit_code == 3
        assert world.diary.of("publish") == [0, 1, 2, 3]
        assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000002", "step-000003"]
        assert len(guard_events(tmp_path)) == attempt
    assert world.diary.of("record") == [step for step in range(BAD + 1) for _ in range(2)]


@every_guard
async def test_pause_waits_before_the_publish_until_its_file_is_deleted(tmp_path: Path, drill: Drill) -> None:
    world = drill.world(tmp_path, "pause")
    run = asyncio.create_task(world.coordinator().run(State(0, 0.1)))
    await until((tmp_path / PAUSED_FILE).exists)
    await asyncio.sleep(0.02)
    assert world.diary.of("publish") == [0, 1, 2, 3]
    text = (tmp_path / PAUSED_FILE).read_text(encoding="utf-8")
    assert f"guards.{drill.guard}." in text
    assert "Delete this file" in text
    (tmp_path / PAUSED_FILE).unlink()
    assert (await asyncio.wait_for(run, scaled(10))).step == 5
    assert world.diary.of("publish") == [0, 1, 2, 3, 4, 5]
    assert [event["action"] for event in guard_events(tmp_path)] == ["pause"]


@pytest.mark.parametrize("action", ["warn", "pause"])
async def test_failed_rewards_act_below_the_share_that_stops_the_run(tmp_path: Path, action: str) -> None:
    table = guard_table(GuardsConfig.model_validate({"failed_rewards": {"max": 0.2, "action": action}}))
    world = World(tmp_path, steps=1, num_dropped=1, max_failed_fraction=0.5, table=table)
    run = asyncio.create_task(world.coordinator().run(State(0, 0.1)))
    if action == "pause":
        await until((tmp_path / PAUSED_FILE).exists)
        (tmp_path / PAUSED_FILE).unlink()
    assert (await asyncio.wait_for(run, scaled(10))).step == 1
    (event,) = guard_events(tmp_path)
    assert (event["metric"], event["value"], event["bound"]) == ("reward/failed_fraction", 0.25, 0.2)


@pytest.mark.parametrize("action", ["warn", "pause"])
async def test_what_was_told_or_passed_is_not_told_again_when_the_step_is_learned_again(
    tmp_path: Path, action: str
) -> None:
    world = DRILLS[0].world(tmp_path, action, fail_in_step=4)
    run = asyncio.create_task(world.coordinator().run(State(0, 0.1)))
    if action == "pause":
        await until((tmp_path / PAUSED_FILE).exists)
        (tmp_path / PAUSED_FILE).unlink()
    with pytest.raises(RoleDied):
        await asyncio.wait_for(run, scaled(10))
    world.fail_in_step = None
    assert (await asyncio.wait_for(world.coordinator().run(State(0, 0.1)), scaled(10))).step == 5
    assert world.diary.of("learn policy").count(BAD) == 2
    assert len(guard_events(tmp_path)) == 1


async def test_a_run_stopped_while_it_is_paused_waits_again_until_the_file_is_gone(tmp_path: Path) -> None:
    world = DRILLS[0].world(tmp_path, "pause", poll_s=3600.0)
    paused = tmp_path / PAUSED_FILE
    for _ in range(2):
        run = asyncio.create_task(world.coordinator().run(State(0, 0.1)))
        await until(lambda: paused.exists() and world.diary.entries[-1] == ("learn critic", BAD))
        assert run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(run, scaled(10))
        assert world.diary.of("publish").count(BAD + 1) == 0
        world.diary.note("cancelled", BAD)
    paused.unlink()
    assert (await asyncio.wait_for(world.coordinator().run(State(0, 0.1)), scaled(10))).step == 5
    assert len(guard_events(tmp_path)) == 1


async def test_a_reward_jump_is_judged_by_the_log_also_after_a_restart_from_a_checkpoint(tmp_path: Path) -> None:
    world = DRILLS[4].world(tmp_path, "stop", every_steps=3, fail_in_step=3)
    with pytest.raises(RoleDied):
        await world.coordinator().run(State(0, 0.1))
    world.fail_in_step = None
    with pytest.raises(GuardTripped, match=r"step 3: reward/mean is 4; guards\.reward_jump\.max allows at most 2\.414"):
        await world.coordinator().run(State(0, 0.1))


async def test_a_stopped_run_goes_on_under_a_gentler_guard(tmp_path: Path) -> None:
    world = DRILLS[0].world(tmp_path, "stop")
    with pytest.raises(GuardTripped, match=r"guards\.kl\.action=warn"):
        await world.coordinator().run(State(0, 0.1))
    world.table = DRILLS[0].world(tmp_path, "warn").table
    assert (await world.coordinator().run(State(0, 0.1))).step == 5
    assert [event["action"] for event in guard_events(tmp_path)] == ["stop", "warn"]


async def test_a_stop_comes_before_a_pause_and_after_warnings(tmp_path: Path) -> None:
    table = [
        Guard("kl", "kl/per_response", "pause", maximum=1.0),
        Guard("mismatch", "kl/per_response", "stop", maximum=1.0),
        Guard("length", "kl/per_response", "warn", maximum=1.0),
    ]
    with pytest.raises(GuardTripped, match=r"guards\.mismatch\.max"):
        await checked(tmp_path, table, 0, {"kl/per_response": 2.0})
    assert [event["action"] for event in guard_events(tmp_path)] == ["warn", "stop"]
    assert not (tmp_path / PAUSED_FILE).exists()


async def test_what_is_not_a_number_breaks_every_bound(tmp_path: Path) -> None:
    table = [Guard("entropy", "policy/entropy", "stop", minimum=0.5), Guard("kl", "kl/per_response", "warn", maximum=5)]
    with pytest.raises(GuardTripped, match=r"policy/entropy is nan; guards\.entropy\.min"):
        await checked(tmp_path, table, 0, {"policy/entropy": math.nan, "kl/per_response": math.inf})
    assert [event["value"] for event in guard_events(tmp_path)] == [None, None]


@pytest.mark.parametrize(("reward", "trips"), [(0.3 + 1e-12, False), (0.4, True)])
async def test_a_reward_that_never_changes_may_differ_by_rounding(tmp_path: Path, reward: float, trips: bool) -> None:
    table = guard_table(GuardsConfig.model_validate({"reward_jump": {"max": 3, "window": 3, "action": "warn"}}))
    await checked(tmp_path, table, 3, {"reward/mean": reward}, past=dict.fromkeys(range(3), {"reward/mean": 0.3}))
    assert bool(guard_events(tmp_path)) == trips


async def test_a_step_passes_what_it_did_not_measure_or_has_too_little_to_compare_with(tmp_path: Path) -> None:
    table = guard_table(GuardsConfig.model_validate({"entropy": {"min": 1}, "reward_jump": {"max": 1, "window": 3}}))
    await checked(tmp_path, table, 2, {"reward/mean": 99.0}, past=dict.fromkeys(range(2), {"reward/mean": 0.3}))
    await checked(tmp_path, table, 7, {"reward/mean": 99.0}, past={5: {"reward/mean": 0.3}, 6: {"reward/mean": 0.2}})
    assert guard_events(tmp_path) == []


async def checked(
    folder: Path, table: Any, step: int, metrics: Metrics, past: Mapping[int, Metrics] | None = None
) -> None:
    guards = Guards(
        table,
        folder=folder,
        telemetry=Telemetry(folder, "run", 1),
        past=(past or {}).get,
        console=print,
        acted=acted_before(folder),
    )
    await guards.check(step, metrics)


def test_all_guards_are_off_unless_they_have_a_bound() -> None:
    assert guard_table(GuardsConfig()) == ()


def test_every_guard_watches_a_metric_of_the_catalogue() -> None:
    bounds = {name: {"min" if name == "entropy" else "max": 0.1} for name in GuardsConfig.model_fields}
    table = guard_table(GuardsConfig.model_validate(bounds))
    assert [guard.name for guard in table] == list(GuardsConfig.model_fields)
    assert all(guard.metric in METRICS for guard in table)


@pytest.mark.parametrize(
    ("guards", "message"),
    [
        ({"length": {"min": 20, "max": 10}}, r"guards\.length\.min=20 is above guards\.length\.max=10"),
        ({"length": {"min": 65}}, r"guards\.length\.min=65 is above rollout\.max_new_tokens=64"),
        ({"length": {"max": 64}}, r"guards\.length\.max=64 can never trip"),
        ({"reward_jump": {"max": 4, "window": 20}}, r"guards\.reward_jump\.window=20 is never full"),
        ({"failed_rewards": {"max": 0.1}}, r"guards\.failed_rewards\.max=0\.1 can never trip"),
        ({"failed_rewards": {"max": 0.05, "action": "stop"}}, r"guards\.failed_rewards\.action"),
        ({"kl": {"max": 0}}, r"guards\.kl\.max"),
        ({"kl": {"max": 5, "action": "halt"}}, r"guards\.kl\.action"),
        ({"max_kl": 5}, r"unknown key 'guards\.max_kl'; did you mean 'guards\.kl'"),
    ],
)
def test_bounds_that_contradict_are_refused(guards: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(guards)


def test_bounds_that_fit_are_taken() -> None:
    config = config_of({"length": {"min": 2, "max": 63}, "reward_jump": {"max": 4}, "failed_rewards": {"max": 0.05}})
    assert [guard.name for guard in guard_table(config.guards)] == ["length", "reward_jump", "failed_rewards"]


def config_of(guards: dict[str, Any]) -> Config:
    return config_from_tree({"reward": {"path": "a-model"}, "guards": guards}, source="the test")
