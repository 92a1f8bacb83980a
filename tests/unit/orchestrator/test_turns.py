"""The life of a step on shared GPUs: in each phase its parts are there, and nothing else is."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from orchestrator.errors import RoleDied
from orchestrator.turns import PHASES, SharedGpus
from orchestrator.types import State
from tests.unit.orchestrator.fakes import Diary, FakeLearner, FakeRollouts
from tests.unit.orchestrator.test_coordinator import World

NEEDS = {
    "generate": "sample",
    "score": "score",
    "learn policy": "policy",
    "learn critic": "critic",
    "publish": "publish",
}
STEP = [
    *("wake kv_cache", "generate", "generate", "sleep"),
    "score",
    *("resume policy", "learn policy", "rest policy"),
    *("resume critic", "learn critic", "rest critic"),
    *("wake weights", "publish"),
]


def shared(diary: Diary) -> SharedGpus:
    return SharedGpus(FakeRollouts(diary, version=0), {name: FakeLearner(name, diary) for name in ("policy", "critic")})


def events(diary: Diary) -> list[str]:
    """Without repetitions of scoring, which is concurrent, and without recording and trimming."""
    left_out = ("record", "evaluate", "trim")
    seen = [what for what, _ in diary.entries if not what.startswith(left_out)]
    return [what for number, what in enumerate(seen) if what != "score" or seen[number - 1] != "score"]


async def test_a_step_is_this_sequence(tmp_path: Path) -> None:
    world = World(tmp_path, steps=3, takes_turns=True, shares_gpus=True)
    await world.coordinator().run(State(0, 0.1))
    whole = events(world.diary)
    first = whole.index("publish")
    assert set(whole[:first]) == {"rest policy", "rest critic", "sleep", "wake weights"}
    after_evaluation = whole[first + 1 :]
    evaluation = ["wake kv_cache", "generate", "generate", "sleep", "score", "wake weights"]
    assert after_evaluation[: len(evaluation)] == evaluation
    steps = after_evaluation[len(evaluation) :]
    assert steps[: 3 * len(STEP)] == 3 * STEP


@pytest.mark.parametrize("samples_again", [False, True])
async def test_engines_keep_their_weights_when_they_sample_again_before_a_publish(
    tmp_path: Path, samples_again: bool
) -> None:
    world = World(tmp_path, steps=2, takes_turns=True, shares_gpus=True, samples_again=samples_again)
    await world.coordinator().run(State(0, 0.1))
    holding = True
    for what, number in world.diary.entries:
        holding = {"publish": True, "sleep": holding and number == 1}.get(what, holding)
        assert holding or what != "generate"
    assert world.diary.of("sleep")[2:-1] == [1 if samples_again else 2] * 2


async def test_a_run_that_continues_at_a_due_and_unsaved_step_samples_what_it_published(tmp_path: Path) -> None:
    world = World(tmp_path, takes_turns=True, shares_gpus=True, fail_in_step=2)
    with pytest.raises(RoleDied):
        await world.coordinator().run(State(0, 0.1))
    world.fail_in_step, world.every_steps = None, 2
    world.diary.entries.clear()
    await world.coordinator().run(State(0, 0.1))
    assert world.diary.of("sleep")[1] == 1, "nothing was sampled from the published weights yet"
    assert world.diary.of("generate") == [2, 2, 3, 3, 4, 4]


async def test_what_computes_finds_its_parts_and_nothing_else(tmp_path: Path) -> None:
    world = World(tmp_path, steps=4, takes_turns=True, shares_gpus=True, every_steps=1, evaluate_every=2)
    await world.coordinator().run(State(0, 0.1))
    engines: set[str] = set()
    states = {"policy", "critic"}
    for what, _ in world.diary.entries:
        if what == "sleep":
            engines.clear()
        elif what.startswith("wake "):
            engines.add(what.removeprefix("wake "))
        elif what.startswith("rest "):
            states.discard(what.removeprefix("rest "))
        elif what.startswith("resume "):
            states.add(what.removeprefix("resume "))
        elif what in NEEDS:
            presence = PHASES[NEEDS[what]]
            assert (engines, states) == (set(presence.engines), set(presence.states)), what


@pytest.mark.parametrize("needs_critic", [True, False])
async def test_nothing_computes_before_all_that_computed_returned_their_memory(
    tmp_path: Path, needs_critic: bool
) -> None:
    models = {"policy", "reference", "reward"} | ({"critic"} if needs_critic else set())
    computes = {
        "score": models,
        "learn policy": {"policy"},
        "learn critic": {"critic"},
        "publish": {"policy"},
        "generate": set(),
    }
    world = World(
        tmp_path,
        takes_turns=True,
        shares_gpus=True,
        every_steps=1,
        evaluate_every=2,
        needs_critic=needs_critic,
    )
    await world.coordinator().run(State(0, 0.1))
    keeping: dict[str, str] = {}
    for what, _ in world.diary.entries:
        kind, _, role = what.partition(" ")
        if kind in ("trim", "rest"):
            keeping.pop(role, None)
        elif what in computes:
            assert set(keeping.values()) <= {what}, f"{keeping} at {what}"
            keeping |= dict.fromkeys(computes[what], what)


async def test_phases_never_overlap() -> None:
    turns = shared(Diary())
    running: list[str] = []

    async def work(phase: str) -> None:
        async with turns.hold(phase):  # type: ignore[arg-type]
            running.append(phase)
            await asyncio.sleep(0)
            assert running == [phase]
            running.remove(phase)

    await asyncio.gather(*(work(phase) for phase in (*PHASES, *PHASES)))


async def test_after_a_failed_call_or_a_restart_everything_is_moved_again() -> None:
    class Dying(FakeRollouts):
        async def wake(self, tags: object) -> None:
            raise RoleDied("rollout", 0, "wake", "killed by the test")

    diary = Diary()
    turns = SharedGpus(Dying(diary, version=0), {"policy": FakeLearner("policy", diary)})
    with pytest.raises(RoleDied):
        async with turns.hold("publish"):
            raise AssertionError("the phase began without its parts")
    async with turns.hold("score"):
        pass
    assert [what for what, _ in diary.entries] == ["rest policy", "sleep"] * 2
    async with turns.hold("score"):
        pass
    assert len(diary.entries) == 4
    turns.forget()
    async with turns.hold("policy"):
        pass
    assert [what for what, _ in diary.entries][4:] == ["trim policy", "sleep", "resume policy"]


async def test_engines_with_their_own_gpus_are_left_alone() -> None:
    diary = Diary()
    turns = SharedGpus(None, {"policy": FakeLearner("policy", diary)})
    for phase in PHASES:
        async with turns.hold(phase):
            pass
    assert {what for what, _ in diary.entries} == {"rest policy", "trim policy", "resume policy"}
