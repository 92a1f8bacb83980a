import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.planning.balance import micro_batches, packed_micro_batches, plan_forwards, plan_minibatches

LENGTHS = st.lists(st.integers(1, 300), max_size=60)


def rows_of(ranks):
    return sorted(row for micros in ranks for micro in micros for row in micro)


@given(LENGTHS, st.integers(1, 5), st.integers(1, 4), st.integers(1, 600), st.integers(0, 2**40))
def test_every_row_is_learned_once_in_an_equal_number_of_micro_batches(lengths, minibatches, ranks, budget, seed):
    plan = plan_minibatches(lengths, num_minibatches=minibatches, num_ranks=ranks, micro_batch_tokens=budget, seed=seed)
    assert sorted(itertools.chain(*map(rows_of, plan))) == list(range(len(lengths)))
    sizes = [len(rows_of(minibatch)) for minibatch in plan]
    assert not sizes or max(sizes) - min(sizes) <= 1
    for minibatch in plan:
        assert len(minibatch) == ranks
        assert len({len(micros) for micros in minibatch}) == 1
        assert rows_of(minibatch), "an empty minibatch would be an optimizer step on nothing"


@given(LENGTHS, st.integers(1, 600))
def test_padded_micro_batches_stay_within_the_budget_unless_one_row_alone_does_not(lengths, budget):
    for micro in micro_batches(range(len(lengths)), lengths, budget):
        padded = len(micro) * max(lengths[row] for row in micro)
        assert padded <= budget or len(micro) == 1


@given(LENGTHS, st.integers(0, 1000), st.integers(1, 4))
def test_minibatches_hold_the_same_rows_on_any_number_of_ranks(lengths, seed, ranks):
    def split(num_ranks):
        plan = plan_minibatches(
            lengths, num_minibatches=3, num_ranks=num_ranks, micro_batch_tokens=256, seed=(seed, 1, 0)
        )
        return [rows_of(minibatch) for minibatch in plan]

    assert split(1) == split(ranks)


def test_the_seed_decides_and_nothing_else():
    def plan(seed):
        return plan_minibatches(list(range(1, 41)), num_minibatches=4, num_ranks=2, micro_batch_tokens=64, seed=seed)

    assert plan((1, 2, 3)) == plan((1, 2, 3))
    assert plan((1, 2, 3)) != plan((1, 2, 4))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.integers(1, 4), st.integers(1, 3))
def test_groups_stay_in_one_minibatch(sizes, minibatches, ranks):
    groups = [number for number, size in enumerate(sizes) for _ in range(size)]
    plan = plan_minibatches(
        [3] * len(groups), num_minibatches=minibatches, num_ranks=ranks, micro_batch_tokens=9, seed=1, groups=groups
    )
    found = [{groups[row] for row in rows_of(ranks)} for ranks in plan]
    assert sum(len(part) for part in found) == len(sizes), "a group is in two minibatches"
    assert rows_of([micros for ranks in plan for micros in ranks]) == list(range(len(groups)))


def test_groups_of_one_are_as_none():
    def plan(groups):
        lengths = list(range(1, 31))
        return plan_minibatches(lengths, num_minibatches=3, num_ranks=2, micro_batch_tokens=64, seed=5, groups=groups)

    assert plan(None) == plan(list(range(30)))


def test_ranks_get_about_as_many_tokens():
    lengths = [400, 10, 10, 390, 200, 210, 15, 15]
    (ranks,) = plan_minibatches(lengths, num_minibatches=1, num_ranks=2, micro_batch_tokens=1000, seed=0)
    loads = [sum(lengths[row] for micro in micros for row in micro) for micros in ranks]
    assert max(loads) - min(loads) <= 10


def test_micro_batches_are_sorted_by_length():
    assert micro_batches([0, 1, 2, 3, 4], [10, 30, 20, 9, 60], 60) == [(4,), (1, 2), (0, 3)]


def test_micro_batches_are_cut_where_it_saves_padding_and_not_more_often():
    answers = [286, 263, 248, 201, 177, 167, 115, 115]  # as full as possible: seven of 286, one of 115
    assert micro_batches(range(8), answers, 2048) == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert micro_batches(range(8), [100] * 8, 400) == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert micro_batches(range(8), [100, 99, 98, 97, 96, 95, 94, 93], 800) == [tuple(range(8))]


@given(LENGTHS, st.integers(100, 300))
def test_micro_batches_cost_no_more_than_the_fullest_ones(lengths, budget):
    def cost(plan):
        return sum(len(rows) * lengths[rows[0]] + budget / 5 for rows in plan)

    fullest, current = [], []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if current and (len(current) + 1) * lengths[current[0]] > budget:
            fullest.append(current)
            current = []
        current.append(row)
    found = micro_batches(range(len(lengths)), lengths, budget)
    assert cost(found) <= cost([*fullest, current] if current else fullest) + 1e-6
    assert all(len(rows) == 1 or len(rows) * lengths[rows[0]] <= budget for rows in found)


@given(LENGTHS, st.integers(1, 4))
def test_forwards_give_each_rank_its_own_rows_and_as_many_forwards(lengths, ranks):
    plan = plan_forwards(lengths, num_ranks=ranks, micro_batch_tokens=200)
    for rank, micros in enumerate(plan):
        assert rows_of([micros]) == list(range(rank, len(lengths), ranks))
    assert len({len(micros) for micros in plan}) == 1


@pytest.mark.parametrize("num_minibatches", [3, 8])
def test_fewer_rows_than_minibatches_leave_no_empty_one(num_minibatches):
    plan = plan_minibatches([5, 6], num_minibatches=num_minibatches, num_ranks=2, micro_batch_tokens=64, seed=0)
    assert len(plan) == 2


@given(LENGTHS, st.integers(1, 1000))
def test_packed_micro_batches_hold_every_row_once_and_no_more_tokens_than_they_may(lengths, budget):
    plan = packed_micro_batches(range(len(lengths)), lengths, budget)
    assert sorted(row for micro in plan for row in micro) == list(range(len(lengths)))
    assert all(len(micro) == 1 or sum(lengths[row] for row in micro) <= budget for micro in plan)
    # No two micro-batches would fit in one.
    loads = sorted(sum(lengths[row] for row in micro) for micro in plan)
    assert len(loads) < 2 or loads[0] + loads[1] > budget


def test_packed_micro_batches_are_those_of_best_fit_by_trying_every_room():
    generator = random.Random(0)
    for _ in range(200):
        lengths = [generator.randint(1, 12) for _ in range(generator.randint(1, 40))]
        rooms: list[tuple[int, list[int]]] = []
        for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
            fits = [place for place, (room, _) in enumerate(rooms) if lengths[row] <= room]
            if fits:
                best = min(fits, key=lambda place: rooms[place][0])
                rooms[best] = (rooms[best][0] - lengths[row], [*rooms[best][1], row])
            else:
                rooms.append((10 - lengths[row], [row]))
        assert packed_micro_batches(range(len(lengths)), lengths, 10) == [tuple(row) for _, row in rooms]


def test_packed_micro_batches_fill_the_room_that_is_left():
    assert packed_micro_batches([0, 1, 2, 3, 4], [10, 30, 20, 9, 60], 60) == [(4,), (1, 2, 0), (3,)]
    plan = plan_forwards([10, 30, 20, 9, 60], num_ranks=1, micro_batch_tokens=70, is_packed=True)
    assert plan == [[(4, 0), (1, 2, 3)]]
