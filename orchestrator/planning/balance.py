"""Assigns rows to ranks and micro-batches. Each rank computes the same plan from the same numbers."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

MicroBatch = tuple[int, ...]  # row indices; () is a dummy that keeps the number of forwards equal on all ranks
RankPlan = list[MicroBatch]
_OVERHEAD = 1 / 5
# Cost of attention over a line, in tokens per squared token: masked pairs are computed too. Measured on a CPU with
# hidden size 576. Larger models and GPUs spend relatively more on tokens, so this value favours separate rows.
_TOKENS_PER_PAIR = 1 / 3000


def plan_minibatches(
    lengths: Sequence[int],
    *,
    num_minibatches: int,
    num_ranks: int,
    micro_batch_tokens: int,
    seed: int | Sequence[int],
    groups: Sequence[int] | None = None,
    is_packed: bool = False,
) -> list[list[RankPlan]]:
    """Splits rows into minibatches, over ranks, and into micro-batches.

    The rows of a minibatch depend only on `seed`, not on the number of ranks. All ranks have the same number of
    micro-batches in a minibatch (ZeRO-3 runs collectives in each forward). Minibatches without rows are left out.

    Args:
        lengths: tokens of each row, prompt and response together.
        micro_batch_tokens: largest rows × longest row; a longer single row is a separate micro-batch.
        seed: seed of the permutation.
        groups: group id of each row; the rows of a group stay in one minibatch. None: each row is its own group.
        is_packed: micro-batches have no padding.

    Returns:
        plan[minibatch][rank] = micro-batches, longest rows first.
    """
    members: dict[int, list[int]] = {}
    for row, group in enumerate(range(len(lengths)) if groups is None else groups):
        members.setdefault(group, []).append(row)
    permutation = np.random.default_rng(seed).permutation(len(members))
    grouped = list(members.values())
    parts = [
        [row for number in part for row in grouped[number]]
        for part in np.array_split(permutation, num_minibatches)
        if len(part)
    ]
    cut = packed_micro_batches if is_packed else micro_batches
    return [
        _level([cut(rows, lengths, micro_batch_tokens) for rows in _balance(part, lengths, num_ranks)])
        for part in parts
    ]


def plan_forwards(
    lengths: Sequence[int], *, num_ranks: int, micro_batch_tokens: int, is_packed: bool = False
) -> list[RankPlan]:
    """plan[rank] = micro-batches of the rows i with i % num_ranks == rank, equally many on all ranks."""
    cut = packed_micro_batches if is_packed else micro_batches
    return _level([cut(range(rank, len(lengths), num_ranks), lengths, micro_batch_tokens) for rank in range(num_ranks)])


def micro_batches(rows: Sequence[int], lengths: Sequence[int], micro_batch_tokens: int) -> RankPlan:
    """Packs rows, sorted by length, so that rows × longest row (with padding) stays within the budget.

    Minimises the number of tokens, including padding, over all ways to cut the sorted rows. Each micro-batch costs
    _OVERHEAD of a full one in addition, for reading weights and accumulating gradients.
    """
    ordered = sorted(rows, key=lambda row: (-lengths[row], row))
    overhead = micro_batch_tokens * _OVERHEAD
    cheapest = [0.0] * (len(ordered) + 1)  # of the rows from here on
    end_of = [0] * len(ordered)
    for start in reversed(range(len(ordered))):
        longest = lengths[ordered[start]]
        most = max(1, micro_batch_tokens // max(longest, 1))
        ends = range(start + 1, min(start + most, len(ordered)) + 1)
        costs = [(end - start) * longest + cheapest[end] for end in ends]
        cheapest[start] = overhead + min(costs)
        end_of[start] = ends[len(costs) - 1 - costs[::-1].index(min(costs))]
    plan: RankPlan = []
    start = 0
    while start < len(ordered):
        plan.append(tuple(ordered[start : end_of[start]]))
        start = end_of[start]
    return plan


def packed_micro_batches(rows: Sequence[int], lengths: Sequence[int], micro_batch_tokens: int) -> RankPlan:
    """As `micro_batches` for rows without padding: each row, longest first, goes where the least room remains (best
    fit, Johnson 1974), so that micro-batches are few. A row that is longer than the budget gets its own."""
    plan: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room, its micro-batch), ascending
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        place = bisect_left(rooms, (lengths[row], 0))
        if place < len(rooms):
            room, number = rooms.pop(place)
        else:
            room, number = micro_batch_tokens, len(plan)
            plan.append([])
        plan[number].append(row)
        insort(rooms, (room - lengths[row], number))
    return [tuple(micro) for micro in plan]


def share_prompt(prompt: int, responses: Sequence[int], *, longest: int) -> list[list[int]]:
    """Splits the responses of one prompt into lines: halves them until a line is cheaper than separate rows.

    Args:
        prompt, responses: number of tokens of each.
        longest: maximum tokens of a line; a response that exceeds it with its prompt gets its own line.
    """
    together = prompt + sum(responses)
    apart = sum(_line_cost(prompt + response) for response in responses)
    if len(responses) == 1 or (together <= longest and _line_cost(together) < apart):
        return [list(range(len(responses)))]
    half = len(responses) // 2
    later = share_prompt(prompt, responses[half:], longest=longest)
    return share_prompt(prompt, responses[:half], longest=longest) + [[half + i for i in part] for part in later]


def _line_cost(tokens: int) -> float:
    return tokens + tokens**2 * _TOKENS_PER_PAIR


def _balance(rows: Sequence[int], lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Assigns rows, longest first, to the rank with the fewest tokens (Graham's LPT rule; ties: the lower rank)."""
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        lightest = min(range(num_ranks), key=lambda rank: loads[rank])
        ranks[lightest].append(row)
        loads[lightest] += lengths[row]
    return ranks


def _level(plans: list[RankPlan]) -> list[RankPlan]:
    most = max((len(plan) for plan in plans), default=0)
    return [[*plan, *[()] * (most - len(plan))] for plan in plans]
