from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.training.ranking import (
    concordant_pairs,
    difference_interval,
    epoch_batches,
    kendall_tau,
    num_pairs,
    spread,
    thinned,
    wilson_interval,
)


@given(num_records=st.integers(0, 40), size=st.integers(1, 9), seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_every_record_is_in_exactly_one_batch(num_records: int, size: int, seed: int, epoch: int) -> None:
    batches = list(epoch_batches(num_records, records_per_batch=size, seed=seed, epoch=epoch))
    assert sorted(number for batch in batches for number in batch) == list(range(num_records))
    assert all(len(batch) == size for batch in batches[:-1])


def test_the_order_follows_from_seed_and_epoch_and_nothing_else() -> None:
    np.random.seed(3)
    first, again, later, other = (
        list(epoch_batches(20, records_per_batch=4, seed=seed, epoch=epoch))
        for seed, epoch in ((1, 0), (1, 0), (1, 1), (2, 0))
    )
    assert again == first and later != first and other != first


def test_spread_takes_evenly_spaced_items() -> None:
    assert spread(list(range(10)), 5) == [0, 2, 4, 6, 8]
    assert spread(list(range(10)), 3) == [0, 3, 6]
    assert spread([1, 2], 5) == [1, 2]


def test_pairs_in_the_right_order_are_counted_and_ties_count_half() -> None:
    assert concordant_pairs([3.0, 2.0, 1.0]) == 3
    assert concordant_pairs([1.0, 2.0, 3.0]) == 0
    assert concordant_pairs([2.0, 3.0, 1.0]) == 2
    assert concordant_pairs([1.0, 1.0]) == 0.5
    assert num_pairs(4) == 6


def test_wilson_interval_equals_the_published_example() -> None:
    # Newcombe (1998), Statistics in Medicine 17, table I: 81/263, 15/148, 0/20, 1/29.
    for successes, trials, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_kendall_tau_by_hand() -> None:
    assert kendall_tau([1, 2, 3], [10, 20, 30]) == 1
    assert kendall_tau([1, 2, 3], [30, 20, 10]) == -1
    assert kendall_tau([4, 3, 2, 1], [4, 3, 1, 2]) == pytest.approx(4 / 6)
    # 6 pairs; one tie in the first list, none in the second: 5 concordant of sqrt(5 * 6).
    assert kendall_tau([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(5 / np.sqrt(30))
    assert kendall_tau([1, 1, 1], [1, 2, 3]) is None


@pytest.mark.parametrize("count", [1, 7, 8, 13, 14, 15, 1000])
def test_thinned_items_are_evenly_spread(count: int) -> None:
    found = thinned(iter(range(count)), 7)
    assert len(found) == min(count, 7) and found == sorted(set(found)) and found[0] == 0
    assert all(later - earlier <= max(2 * count / 7, 1) for earlier, later in pairwise([*found, count]))
    if count <= 14:
        assert found == spread(range(count), 7)


def test_the_interval_of_a_difference_is_newcombes() -> None:
    """Newcombe 1998, table II, method 10: 56/70 - 48/80, and 10/10 - 0/20."""
    assert difference_interval(56, 70, 48, 80) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    assert difference_interval(10, 10, 0, 20) == pytest.approx((0.6791, 1.0), abs=1e-4)
    low, high = difference_interval(48, 80, 56, 70)
    assert (-high, -low) == pytest.approx((0.0524, 0.3339), abs=1e-4)
