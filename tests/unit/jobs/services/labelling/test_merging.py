"""Reliabilities and merged orders, on rows worked by hand and on simulated people."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from statistics import fmean
from typing import Any

import pytest

from jobs.services.labelling.agreement.given import Given
from jobs.services.labelling.agreement.merging import (
    Vote,
    as_order,
    margins,
    ranked_pairs,
    reliabilities,
    votes_of,
    weight,
)
from jobs.services.labelling.agreement.quality import figures_of, kendall_tau, spam_score


def test_votes_of_a_ranking_leave_out_what_is_not_rankable() -> None:
    found = [
        (vote.first, vote.second, vote.first_is_better)
        for vote in votes_of(1, 2, {"kind": "rank", "ranks": [2, 1, None, 2]})
    ]
    assert found == [(0, 1, 0.0), (0, 3, 0.5), (1, 3, 1.0)]


@pytest.mark.parametrize(("preference", "first_is_better"), [(-3, 1.0), (0, 0.5), (1, 0.0)])
def test_votes_of_a_comparison(preference: int, first_is_better: float) -> None:
    assert list(votes_of(1, 2, {"kind": "compare", "preference": preference})) == [Vote(1, 2, 0, 1, first_is_better)]


def test_ranked_pairs_by_hand() -> None:
    # A cycle 0 > 1 > 2 > 0, whose weakest majority falls.
    assert ranked_pairs({(0, 1): 5, (1, 2): 3, (2, 0): 1}) == {(0, 1), (1, 2), (0, 2)}
    # What follows from others is contained; what nothing is known about is not.
    assert ranked_pairs({(0, 1): 2, (1, 2): 2, (3, 4): 1}) == {(0, 1), (1, 2), (0, 2), (3, 4)}
    # Equally strong majorities that contradict each other fall together.
    assert ranked_pairs({(0, 1): 2, (1, 2): 2, (2, 0): 2, (0, 3): 1}) == {(0, 3)}
    assert ranked_pairs({}) == frozenset()


def test_an_order_with_ties_is_no_whole_order() -> None:
    assert as_order(frozenset({(2, 0), (2, 1), (0, 1)})) == [2, 0, 1]
    assert as_order(frozenset({(2, 0), (2, 1)})) is None


def test_margins_weigh_votes_and_ties_add_nothing() -> None:
    votes = [Vote(0, 1, 0, 1, 1.0), Vote(0, 2, 0, 1, 0.0), Vote(0, 3, 0, 1, 0.5), Vote(0, 1, 0, 2, 0.5)]
    assert margins(votes, {1: 2.0, 2: 0.5, 3: 9.0}) == {(0, 1): 1.5}


def simulated(rights: dict[int, float], num_items: int, seed: int) -> tuple[list[Vote], list[int]]:
    """Votes of people who are right with a given probability on pairs, and the truth of each item."""
    draw = random.Random(seed)
    truths = [draw.randint(0, 1) for _ in range(num_items)]
    votes = [
        Vote(item, person, 0, 1, float(truth if draw.random() < right else 1 - truth))
        for item, truth in enumerate(truths)
        for person, right in rights.items()
    ]
    return votes, truths


def test_planted_reliabilities_are_found_and_weighing_beats_counting() -> None:
    rights = {1: 0.95, 2: 0.9, 3: 0.6, 4: 0.55, 5: 0.5}
    votes, truths = simulated(rights, 600, seed=3)
    found = reliabilities(votes, {})
    for person, right in rights.items():
        assert found[person] == pytest.approx(right, abs=0.06)

    def num_right(weights: dict[int, float]) -> int:
        by_item = [[vote for vote in votes if vote.item == item] for item in range(len(truths))]
        return sum(
            margins(given, weights).get((0, 1) if truth else (1, 0), 0) > 0
            for given, truth in zip(by_item, truths, strict=True)
        )

    assert num_right({person: weight(right) for person, right in found.items()}) > num_right(dict.fromkeys(rights, 1.0))


def test_gold_tells_what_a_majority_of_guessers_hides() -> None:
    votes, truths = simulated({1: 0.9, 2: 0.5, 3: 0.5}, 200, seed=5)
    gold = {(item, 0, 1): float(truth) for item, truth in enumerate(truths)}
    found = reliabilities(votes, gold)
    assert found[1] > 0.8 and found[2] < 0.6 and found[3] < 0.6


def test_people_alone_on_their_items_keep_the_prior() -> None:
    found = reliabilities([Vote(item, item % 2, 0, 1, 1.0) for item in range(50)], {})
    assert found == {0: pytest.approx(0.8), 1: pytest.approx(0.8)}
    assert weight(0.8) == pytest.approx(math.log(4)) and weight(0.3) == weight(0.5) == 0


def test_kendall_tau_by_hand() -> None:
    assert kendall_tau([1, 2, 3, 4], [1, 2, 3, 4]) == 1
    assert kendall_tau([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    assert kendall_tau([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)
    assert kendall_tau([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / math.sqrt(2 * 3))
    assert kendall_tau([1, None, 2], [1, 2, 3]) == 1
    assert kendall_tau([1, 1], [1, 2]) is None


def test_a_spam_score_needs_evidence() -> None:
    assert spam_score(0.5, 0) == 0
    assert spam_score(0.5, 10) == 0
    assert spam_score(0.4, 1000) == 1
    assert 0 < spam_score(0.56, 200) < 1
    assert spam_score(0.9, 1000) == 0


def ranked(scores: list[float]) -> dict[str, Any]:
    order = sorted(range(len(scores)), key=lambda reply: -scores[reply])
    return {"kind": "rank", "ranks": [order.index(reply) + 1 for reply in range(len(scores))]}


def population(seed: int) -> tuple[list[Given], dict[int, list[float]]]:
    """Twenty people, each with 150 of 600 items of four replies, 30 of them gold. 0 guesses, 1 takes what is shown
    first, 2 copies 3; the others see the true scores with noise of 0.3 to 0.9."""
    draw = random.Random(seed)
    truth = {item: [draw.gauss(0, 1) for _ in range(4)] for item in range(600)}
    given: list[Given] = []
    of_three: dict[int, dict[str, Any]] = {}
    for person in (3, 0, 1, 2, *range(4, 20)):
        for item in sorted(of_three) if person == 2 else draw.sample(range(600), 150):
            order = draw.sample(range(4), 4)
            noise = 0.3 + 0.6 * (person - 3) / 16
            answer = ranked([score + draw.gauss(0, noise) for score in truth[item]])
            if person == 0:
                answer = ranked([draw.random() for _ in range(4)])
            elif person == 1:
                answer = ranked([-float(order.index(reply)) for reply in range(4)])
            elif person == 2:
                answer = of_three[item]
            elif person == 3:
                of_three[item] = answer
            given.append(Given(item, person, answer, order, 10.0, ranked(truth[item]) if item < 30 else None))
    return given, truth


@pytest.mark.parametrize("seed", range(2))
def test_spammers_are_found_no_careful_person_is_accused_and_merging_beats_the_mean_person(seed: int) -> None:
    given, truth = population(seed)
    found = figures_of(given, {person: f"{person:02}" for person in range(20)})
    assert min(figure.spam for figure in found[:2]) > 0.4
    assert max(figure.spam for figure in found[2:]) < 0.1
    assert {figure.name: figure.copy_of for figure in found if figure.copy_of} == {"02": "03", "03": "02"}
    assert found[1].first_share == 1.0 and all((figure.first_share or 0) < 0.5 for figure in found[2:])

    votes = [vote for each in given for vote in votes_of(each.item, each.person, each.answer)]
    gold = {
        (item, vote.first, vote.second): vote.first_is_better
        for item in range(30)
        for vote in votes_of(item, 0, ranked(truth[item]))
    }
    weights = {person: weight(right) for person, right in reliabilities(votes, gold).items()}
    by_item: dict[int, list[Vote]] = {}
    for vote in votes:
        if vote.item >= 30:
            by_item.setdefault(vote.item, []).append(vote)

    def share_right(pairs: Iterable[tuple[int, int, int]]) -> float:
        return fmean(truth[item][better] > truth[item][worse] for item, better, worse in pairs)

    merged = share_right(
        (item, *pair) for item, given_votes in by_item.items() for pair in ranked_pairs(margins(given_votes, weights))
    )
    singles = share_right(
        (vote.item, vote.first, vote.second) if vote.first_is_better == 1 else (vote.item, vote.second, vote.first)
        for given_votes in by_item.values()
        for vote in given_votes
    )
    assert merged > singles + 0.05
