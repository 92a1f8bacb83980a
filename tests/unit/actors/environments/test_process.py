"""An environment that raises, hangs, dies or answers rubbish fails its own episode; the others go on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from actors.environments.contract import Task
from actors.environments.process import Answer, Episodes
from orchestrator.config.environments import EnvironmentConfig
from orchestrator.config.rewards import RuleLimits
from orchestrator.errors import ConfigError
from tests.deadlines import scaled

HERE = "tests.unit.actors.environments.hostile"
LIMITS = RuleLimits(import_s=scaled(60.0), memory_gib=0.5, processes=20)
STEP_S = scaled(2.0)


def environment(name: str, **keys: Any) -> EnvironmentConfig:
    return EnvironmentConfig(name=f"{HERE}:{name}", step_s=STEP_S, **keys)


def started(name: str, **keys: Any) -> Episodes:
    return Episodes(environment(name, **keys), LIMITS)


def later() -> float:
    return monotonic() + scaled(100.0)


def begin(episodes: Episodes, count: int = 3) -> None:
    episodes.begin()
    tasks = {number: Task("hi", {}, 10 + number) for number in range(count)}
    assert all(answer == {"observation": None} for answer in episodes.reset(tasks, later()).values())


def observations(answers: Mapping[int, Answer]) -> dict[int, Any]:
    return {number: answer if isinstance(answer, str) else answer["observation"] for number, answer in answers.items()}


@pytest.fixture(scope="module")
def obedient() -> Iterator[Episodes]:
    with started("Obedient") as episodes:
        yield episodes


def test_each_episode_has_a_state_and_a_task_of_its_own(obedient: Episodes) -> None:
    begin(obedient)
    assert observations(obedient.step({0: "a", 1: "b", 2: "c"}, later())) == {0: "1 10", 1: "1 11", 2: "1 12"}
    answers = obedient.step({2: "a", 0: "end"}, later())
    assert observations(answers) == {2: "2 12", 0: "2 10"}
    assert answers[0] == {
        "observation": "2 10",
        "reward": 0.5,
        "parts": {"environment": 0.5},
        "done": True,
        "info": {"action": "end"},
    }


@pytest.mark.parametrize(
    ("action", "error"),
    [
        ("raise", "Obedient: ValueError: no such move"),
        ("exit", "Obedient: SystemExit: 3"),
        ("kill", "Obedient ended its process with SIGKILL"),
        ("freeze", f"Obedient gave no answer within environment.step_s={STEP_S:g} s"),
        ("spin", "gave no answer within environment.step_s"),
        ("memory", "rule_limits.memory_gib is exhausted"),
        ("nothing", "not (observation, reward, done, info)"),
        ("three", "not (observation, reward, done, info)"),
        ("bytes", "returned the observation b'a', not text"),
        ("number", "returned the observation 7, not text"),
        ("silent", "returned no observation, and the episode is not over"),
        ("nan", "reward: returned nan, not a finite number"),
        ("no reward", "reward: returned None"),
        ("text reward", "reward: returned '1'"),
        ("done", "returned done='yes', not true or false"),
        ("long", "an observation of 262144 characters"),
        ("surrogate", "lone surrogates"),
    ],
)
def test_a_bad_step_fails_its_own_episode(obedient: Episodes, action: str, error: str) -> None:
    begin(obedient)
    obedient.step({0: "a", 1: "b", 2: "c"}, later())
    answers = obedient.step({0: "a", 1: action, 2: "c"}, later())
    assert isinstance(answers[1], str) and error in answers[1], answers[1]
    assert answers[1].startswith(f"environment {HERE}:Obedient")
    assert observations({number: answers[number] for number in (0, 2)}) == {0: "2 10", 2: "2 12"}
    assert observations(obedient.step({0: "a", 2: "c"}, later())) == {0: "3 10", 2: "3 12"}


def test_rewards_may_have_parts_and_infos_are_kept_as_far_as_they_are_json(obedient: Episodes) -> None:
    begin(obedient, 1)
    (parts,) = obedient.step({0: "parts"}, later()).values()
    assert isinstance(parts, Mapping)
    assert (parts["reward"], parts["parts"]) == (1.25, {"environment.x": 1.0, "environment.y": 0.25})
    (kept,) = obedient.step({0: "object"}, later()).values()
    assert isinstance(kept, Mapping) and kept["info"].startswith("{'info': <object object")


@pytest.mark.parametrize("action", ["kill", "freeze", "raise", "number"])
def test_a_failing_reset_fails_its_own_episode(obedient: Episodes, action: str) -> None:
    obedient.begin()
    tasks = {number: Task("hi", {"reset": action if number == 1 else "Begin."}, number) for number in range(3)}
    answers = obedient.reset(tasks, later())
    assert observations({number: answers[number] for number in (0, 2)}) == {0: "Begin.", 2: "Begin."}
    assert isinstance(answers[1], str)


def test_a_process_that_is_killed_from_outside_costs_nothing(tmp_path: Path) -> None:
    """The action kills the process once; it is asked again in a new one, where the episodes are played again."""
    with started("Obedient", options={"folder": str(tmp_path)}) as episodes:
        begin(episodes)
        episodes.step({0: "a", 1: "b", 2: "c"}, later())
        answers = episodes.step({0: "a", 1: "once", 2: "c"}, later())
        assert (tmp_path / "once").exists()
        assert observations(answers) == {0: "2 10", 1: "2 11", 2: "2 12"}


def test_a_process_that_dies_between_calls_is_replaced(obedient: Episodes) -> None:
    begin(obedient, 2)
    obedient.step({0: "a", 1: "end"}, later())
    obedient._process.close()
    assert observations(obedient.step({0: "a"}, later())) == {0: "2 10"}


def test_an_episode_that_can_not_be_played_again_fails() -> None:
    with started("Fickle") as episodes:
        begin(episodes, 2)
        episodes.step({0: "a", 1: "b"}, later())
        assert isinstance(episodes.step({0: "a", 1: "kill"}, later())[1], str)
        assert "was played again after its process had ended, and answered differently" in str(
            episodes.step({0: "a"}, later())[0]
        )


def test_coroutines_wait_at_the_same_time_and_the_one_that_kills_is_found() -> None:
    with started("Waiting") as episodes:
        begin(episodes, 12)
        before = monotonic()
        answers = episodes.step(dict.fromkeys(range(12), "a"), later())
        assert set(observations(answers).values()) == {"a"}
        assert monotonic() - before < scaled(12 * 0.3)
        answers = episodes.step({0: "a", 1: "kill", 2: "wait", 3: "b"}, later())
        assert observations({number: answers[number] for number in (0, 3)}) == {0: "a", 3: "b"}
        assert "SIGKILL" in str(answers[1]) and "gave no answer within" in str(answers[2])


def test_what_is_left_of_a_shards_time_is_a_limit(obedient: Episodes) -> None:
    begin(obedient, 2)
    answers = obedient.step({0: "freeze", 1: "a"}, monotonic() + STEP_S / 10)
    assert "gave no answer within what was left of its shard's time" in str(answers[0])
    assert "nothing was left of its shard's time" in str(answers[1])


def test_a_process_that_has_ended_is_not_started_again_when_no_time_is_left(obedient: Episodes) -> None:
    begin(obedient, 2)
    obedient._process.close()
    obedient._revive(monotonic())
    assert not obedient._process.is_alive()
    assert observations(obedient.step({0: "a"}, later())) == {0: "1 10"}


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("Missing", "has no 'Missing'; it has: "),
        ("RUBBISH", "it is a dict, not a class with the methods reset and step"),
        ("NoStep", "it has no method step"),
        ("NeedsMore", r"it can't be made with environment.options={}: TypeError: .*'level'"),
    ],
)
def test_a_class_that_is_no_environment_is_a_config_error(name: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        started(name)


def test_options_reach_the_class() -> None:
    with started("NeedsMore", options={"level": 3}) as episodes:
        assert episodes._process.is_alive()
