from __future__ import annotations

import pytest

from orchestrator.errors import (
    DataError,
    DeadlineExceeded,
    NonFiniteError,
    ObjectGone,
    PeerLost,
    PublishError,
    RewardError,
    RlhfError,
    RoleDied,
    RoleError,
)
from orchestrator.failures import Action, Failure, FailurePolicy, category_of

POLICY = FailurePolicy({"infrastructure": 2, "programming": 1, "data": 0}, window_steps=10)


def died(role: str, step: int = 0) -> Failure:
    return Failure.of(RoleDied(role, 0, "work", "gone"), step)


@pytest.mark.parametrize("role", ["rollout", "reference", "reward", "recorder"])
def test_an_actor_without_history_is_restarted_and_asked_again(role: str) -> None:
    assert POLICY.decide(died(role), [], is_placed=True, asks_again=True) is Action.RESTART_ACTOR


@pytest.mark.parametrize("role", ["policy", "critic"])
def test_a_learner_costs_both_learners_and_the_loop_begins_again(role: str) -> None:
    assert POLICY.decide(died(role), [], is_placed=True, asks_again=False) is Action.RESTART_LEARNERS


@pytest.mark.parametrize("asks_again", [True, False])
def test_a_node_that_went_means_placing_all_again(asks_again: bool) -> None:
    assert POLICY.decide(died("reward"), [], is_placed=False, asks_again=asks_again) is Action.PLACE_AGAIN


def test_an_actor_that_could_not_be_restarted_means_placing_all_again() -> None:
    assert POLICY.decide(died("reward"), [], is_placed=True, asks_again=False) is Action.PLACE_AGAIN


def test_a_budget_is_used_up_by_its_own_category_and_within_its_window() -> None:
    data = Failure.of(DataError("row"), 5)
    before = [died("reward", 1), data, died("policy", 9)]
    assert POLICY.decide(died("reward", 10), before, is_placed=True, asks_again=True) is Action.GIVE_UP
    assert POLICY.decide(died("reward", 11), before, is_placed=True, asks_again=True) is Action.RESTART_ACTOR
    assert POLICY.decide(data, [], is_placed=True, asks_again=True) is Action.GIVE_UP


@pytest.mark.parametrize(
    ("error", "category"),
    [
        (RoleDied("rollout", 0, "generate", ""), "infrastructure"),
        (DeadlineExceeded("critic", 0, "learn", ""), "infrastructure"),
        (ObjectGone("reward", 0, "score", ""), "infrastructure"),
        (PeerLost("policy", 0, "learn", ""), "infrastructure"),
        (RoleError("reward", 0, "score", "KeyError"), "programming"),
        (PublishError("lm_head"), "programming"),
        (RewardError("too many"), "data"),
        (NonFiniteError("loss"), "data"),
        (DataError("row"), "data"),
    ],
)
def test_categories(error: RlhfError, category: str) -> None:
    assert category_of(error) == category
