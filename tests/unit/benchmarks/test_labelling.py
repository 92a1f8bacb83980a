"""Simulated labellers have the planted reliability, and verdicts say what was planted."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from statistics import fmean

import pytest

from benchmarks.labelling.minds import CAREFUL, COPY, FIRST, RANDOM, Mind, crowd, true_scores
from benchmarks.labelling.pools import pool
from benchmarks.labelling.verdicts import Taus, gains, taus, verdict
from jobs.services.labelling.agreement.merging import electorate
from jobs.services.labelling.agreement.quality import figures_of


@pytest.mark.parametrize("accuracy", [0.6, 0.72, 0.95])
def test_a_careful_mind_orders_the_planted_share_of_pairs_correctly(accuracy: float) -> None:
    mind = Mind("a", CAREFUL, accuracy, "seed")
    right = []
    for item, scores in enumerate(true_scores(1500, 1)):
        ranks = mind.ranks(item, scores, [0, 1, 2, 3])
        right += [(ranks[a] < ranks[b]) == (scores[a] > scores[b]) for a, b in combinations(range(4), 2)]
    assert fmean(right) == pytest.approx(accuracy, abs=0.015)


def test_spammers_do_what_their_names_say() -> None:
    scores = [1.0, 0.0, -1.0, 2.0]
    minds = {mind.kind: mind for mind in crowd(8, 3).minds if mind.kind != CAREFUL}
    assert minds[FIRST].ranks(0, scores, [2, 0, 3, 1]) == [2, 4, 1, 3]
    copied = crowd(8, 3).by_name[crowd(8, 3).source or ""]
    assert all(
        copied.ranks(item, scores, [0, 1, 2, 3]) == minds[COPY].ranks(item, scores, [3, 2, 1, 0]) for item in range(20)
    )
    assert len({tuple(minds[RANDOM].ranks(item, scores, [0, 1, 2, 3])) for item in range(200)}) == 24


def test_a_verdict_names_what_was_planted_and_merged_orders_are_better_than_people() -> None:
    minds = crowd(12, 0)
    drawn = pool(minds, 0, num_items=450)
    judges = electorate(drawn.given)
    figures = figures_of(drawn.given, drawn.names, judges)
    found = verdict(minds, figures)
    assert (found.found, found.missed, found.accused) == ({"random", "first", "copy"}, frozenset(), frozenset())
    wrong = [
        replace(each, reliability=0.5, num_compared=1000)
        if each.name == "careful-00"
        else replace(each, copy_of="first")
        for each in figures
        if each.name in ("careful-00", "careful-01", "copy")
    ]
    found = verdict(minds, wrong)
    assert found.accused == {"careful-00", "careful-01"} and found.missed == {"random", "first", "copy"}
    gain, low, high = gains(taus(drawn.given, drawn.scores, judges), 0)["mean"]
    assert 0 < low < gain < high


def test_gains_by_hand() -> None:
    found = Taus({1: 1.0, 2: 0.5}, {1: {1: 0.0, 2: 1.0}, 2: {1: 0.5, 2: 0.5}})
    assert found.mean_single() == 0.5 and found.best() == 2
    assert (gains(found, 0)["mean"][0], gains(found, 0)["best"][0]) == (0.25, 0.0)
