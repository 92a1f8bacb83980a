from __future__ import annotations

import pytest

from jobs.stages.work.data.judged import measure, measure_heads, measure_held_out, measure_singles
from orchestrator.data.records import LabelledRecord, Message, RankingRecord
from orchestrator.errors import DataError
from orchestrator.prompts import split_held_out

RECORDS = [RankingRecord(f"p{n}", (Message("user", str(n)),), ("good", "bad")) for n in range(200)]


def test_the_last_records_are_held_out() -> None:
    train, held_out = split_held_out(RECORDS, 20, section="preferences")
    assert (*train, *held_out) == tuple(RECORDS) and len(held_out) == 20
    assert split_held_out(RECORDS, 0, section="preferences") == (tuple(RECORDS), ())


def test_without_a_number_a_tenth_is_held_out_whatever_else_is_in_the_file() -> None:
    train, held_out = split_held_out(RECORDS, None, section="preferences")
    assert 8 <= len(held_out) <= 35 and len(train) + len(held_out) == 200
    assert set(split_held_out(RECORDS[::2], None, section="preferences")[1]) == set(held_out) & set(RECORDS[::2])


def test_nothing_left_to_train_on_is_an_error() -> None:
    with pytest.raises(DataError, match=r"preferences\.held_out"):
        split_held_out(RECORDS[:5], 5, section="preferences")


def test_quality_by_hand() -> None:
    quality = measure([[3.0, 2.0, 1.0], [1.0, 2.0], [0.0, 0.0]])
    assert quality.num_pairs == 5
    assert quality.accuracy == pytest.approx(3.5 / 5)
    assert quality.kendall_tau == 1.0
    low, high = quality.interval
    assert low < 0.7 < high
    assert measure([[3.0, 2.0, 1.0]], gold=[[1.0, 2.0, 3.0]]).kendall_tau == -1.0
    assert measure([]).accuracy is None and measure([]).kendall_tau is None


def test_single_replies_are_compared_where_they_were_judged_differently() -> None:
    # Stars 3, 3, 1, 1 with scores 1, 0.5, 2, 1: wrong, equal, wrong, wrong.
    quality = measure_singles([2.0, 1.0, 0.5, 1.0], [1.0, 3.0, 3.0, 1.0])
    assert (quality.num_pairs, quality.accuracy) == (4, 0.125)
    assert measure_singles([2.0, 1.0], [0.0, 0.0]).accuracy is None
    assert measure_singles([1.0, 2.0, 3.0], [0.0, 1.0, 2.0]).kendall_tau == 1.0


def test_records_say_how_they_are_measured() -> None:
    labels = [LabelledRecord(str(n), (Message("user", "q"),), "a", n > 1) for n in range(4)]
    assert measure_held_out([[0.0], [1.0], [2.0], [3.0]], labels).accuracy == 1.0
    assert measure_held_out([[0.0, 1.0]] * 200, RECORDS).accuracy == 0.0
    assert measure_held_out([], []).accuracy is None


def test_heads_are_measured_alone_and_their_disagreement_by_whether_their_mean_is_right() -> None:
    # Differences of the heads: 2 and 0 (mean 1, deviation 1), -4 and 1 (mean -1.5, deviation 2.5).
    heads = [[[3.0, 1.0], [1.0, 1.0]], [[0.0, 2.0], [4.0, 1.0]]]
    found = measure_heads(heads, RECORDS[:2])
    assert found is not None
    assert (found.accuracies, found.right, found.wrong) == ([0.5, 0.75], 1.0, 2.5)
    assert measure_heads([[[1.0], [0.0]]] * 2, RECORDS[:2]) is None and measure_heads([], []) is None


def test_heads_of_single_replies_are_measured_on_pairs_of_them() -> None:
    labels = [LabelledRecord(str(n), (Message("user", "q"),), "a", n > 0) for n in range(3)]
    found = measure_heads([[[0.0, 0.0]], [[1.0, 3.0]], [[-2.0, 1.0]]], labels)
    assert found is not None
    # Better less worse: 1 and 3 (right), -2 and 1 (wrong).
    assert (found.accuracies, found.right, found.wrong) == ([0.5, 1.0], 1.0, 1.5)
