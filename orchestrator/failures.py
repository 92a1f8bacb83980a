"""Decides what to do about a failure: a pure function of this and earlier failures (docs/adr/0005-failures.md)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, Protocol, TypeVar

from orchestrator.errors import DataError, NonFiniteError, PublishError, RewardError, RlhfError, RoleError, RoleLost

T = TypeVar("T")

Category = Literal["infrastructure", "programming", "data"]
LEARNERS = ("policy", "critic")
ANSWERABLE = (RoleError, PublishError, DataError, RewardError, NonFiniteError)
"""All other errors end the run at once: a guard, a newer attempt, a full disk, too small a cluster."""


class Action(StrEnum):
    RESTART_ACTOR = "restart actor"
    """A new process for this actor, then the same call again."""
    RESTART_LEARNERS = "restart learners"
    """New processes for policy and critic; the loop starts again from checkpoint and log."""
    PLACE_AGAIN = "place again"
    """New processes for all roles, on the present nodes; the loop starts again from checkpoint and log."""
    GIVE_UP = "give up"


@dataclass(frozen=True)
class Failure:
    """A failure, as far as decisions depend on it.

    Args:
        role: empty if the failure belongs to no single role.
        step: number of finished learning steps.
    """

    role: str
    category: Category
    step: int

    @staticmethod
    def of(error: RlhfError, step: int) -> Failure:
        return Failure(error.role if isinstance(error, RoleError) else "", category_of(error), step)


@dataclass(frozen=True)
class FailurePolicy:
    """Args:
    budgets: failures of each category within any `window_steps` steps after which the run continues.
    """

    budgets: Mapping[Category, int]
    window_steps: int

    def decide(self, failure: Failure, before: Sequence[Failure], *, is_placed: bool, asks_again: bool) -> Action:
        """Args:
        before: earlier failures of this attempt.
        is_placed: whether all nodes of the placement plan are there.
        asks_again: whether the caller can retry on the restarted actor.
        """
        if self.used(failure, before) >= self.budgets[failure.category]:
            return Action.GIVE_UP
        if not is_placed:
            return Action.PLACE_AGAIN
        if asks_again:
            return Action.RESTART_ACTOR
        return Action.RESTART_LEARNERS if failure.role in LEARNERS else Action.PLACE_AGAIN

    def used(self, failure: Failure, before: Sequence[Failure]) -> int:
        """The number of failures of this category that already count against its budget."""
        since = failure.step - self.window_steps
        return sum(item.category == failure.category and item.step > since for item in before)


def category_of(error: RlhfError) -> Category:
    """Infrastructure: a process, a node or an object is gone, or did not answer. Data: the same input would fail
    again. Programming: all other errors, which are unexpected."""
    if isinstance(error, RoleLost):
        return "infrastructure"
    return "data" if isinstance(error, (DataError, RewardError, NonFiniteError)) else "programming"


class Supervisor(Protocol):
    """Executes decisions."""

    async def until_done(self, work: Callable[[], Awaitable[T]]) -> T:
        """Awaits `work`, and again after each failure from which the run can recover. Raises all other failures."""


class Unsupervised:
    """Every failure ends the run."""

    async def until_done(self, work: Callable[[], Awaitable[T]]) -> T:
        return await work()
