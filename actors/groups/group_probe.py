"""Tries the process group of a role: its ranks join where the plan has them, and reduce one number."""

from __future__ import annotations

from time import perf_counter

from actors.groups.probes import CONNECT_S, START_S
from actors.groups.starter import Starter
from actors.learning.distributed import Group, join, leave, reduce_sums
from orchestrator.errors import CapacityError

COLLECTIVE_S = 30.0


class GroupProbe:
    """One rank of a process group, which joins as a learner does."""

    def __init__(self, group: Group) -> None:
        self._group = group
        join(group)

    def total(self) -> float:
        """The sum of all ranks' numbers, counted from 1."""
        return reduce_sums({"rank": 1.0 + self._group.rank}, self._group.device)["rank"]

    def leave(self) -> None:
        leave()


async def probe_group(starter: Starter, role: str) -> float:
    """Starts the ranks of a role where the plan has them, and reduces one number. Returns the seconds of the reduction.

    Raises:
        RoleError: they do not come together.
        CapacityError: a rank gets another sum.
    """
    group = await starter.ranks(role, GroupProbe, {})
    try:
        await group.await_ready(START_S)
        started = perf_counter()
        totals = await group.call_all(GroupProbe.total, COLLECTIVE_S + CONNECT_S)
        seconds = perf_counter() - started
        await group.call_all(GroupProbe.leave, CONNECT_S)
    finally:
        group.kill()
    expected = len(group) * (len(group) + 1) / 2
    if any(total != expected for total in totals):
        raise CapacityError(f"the sum over the ranks of {role} should be {expected:g}, and they have {totals}")
    return seconds
