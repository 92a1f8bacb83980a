"""Engines that start asleep are woken: the start of the actors and the turns of the loop go by one predicate."""

from __future__ import annotations

from typing import Any

import pytest

from actors.groups.group import ActorGroup
from jobs.stages.settings import engines_sleep, roles_in_turn
from jobs.stages.work.wiring import learners_of, turns_of
from orchestrator.config.loader import config_from_tree
from tests.unit.orchestrator.fakes import Diary, FakeLearner, FakeRollouts

ENGINE: dict[str, Any] = {"rollout": {"gpus_per_replica": 1}}
POLICY = {"policy": {"gpus_per_rank": 1}}
CRITIC = {"critic": {"gpus_per_rank": 1}}
REFERENCE = {"reference": {"gpus_per_rank": 1}}
SEPARATE, MIXED = ({"placement": {"mode": mode}} for mode in ("separate", "mixed"))
_ADAPTERS = {"gpus_per_rank": 1, "lora": {"rank": 4}}
ON_TRUNK = {"model": {"path": "m"}, "policy": _ADAPTERS, "critic": {"path": "m", **_ADAPTERS}}


@pytest.mark.parametrize(
    ("sections", "in_turn", "sleeps"),
    [
        ({}, set(), False),
        (ENGINE, set(), False),
        (POLICY, {"policy"}, False),
        (ENGINE | POLICY, {"policy"}, True),
        (ENGINE | CRITIC, {"critic"}, True),
        (ENGINE | REFERENCE, {"reference"}, True),
        (ENGINE | POLICY | CRITIC | REFERENCE, {"policy", "critic", "reference"}, True),
        (ENGINE | ON_TRUNK | REFERENCE, {"policy"}, True),
        (ENGINE | POLICY | SEPARATE, set(), False),
        (ENGINE | POLICY | MIXED, {"policy"}, False),
    ],
)
async def test_engines_that_start_asleep_are_woken(sections: dict[str, Any], in_turn: set[str], sleeps: bool) -> None:
    config = config_from_tree({"reward": {"path": "/models/reward"}, **sections}, source="test")
    assert roles_in_turn(config) == in_turn | ({"rollout"} if sleeps else set())
    assert engines_sleep(config) == sleeps
    diary = Diary()
    groups = {role: ActorGroup(role, []) for role in ("policy", "critic")}
    scorers = {role: FakeLearner(role, diary) for role in ("reference", "reward")}
    turns = turns_of(config, learners_of(config, groups), scorers, FakeRollouts(diary))
    async with turns.hold("sample"):
        pass
    seen = [what for what, _ in diary.entries]
    assert ("wake weights" in seen and "wake kv_cache" in seen) == sleeps
    assert {what for what in seen if what.startswith("trim")} == {f"trim {role}" for role in in_turn & scorers.keys()}
