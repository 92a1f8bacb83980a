"""Krippendorff's alpha on rows worked by hand, and people who count as one voter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from benchmarks.labelling.minds import CAREFUL, COPY, Crowd, Mind, crowd
from benchmarks.labelling.pools import Pool, pool, verdicts
from jobs.services.labelling.agreement.alpha import Alpha, alphas
from jobs.services.labelling.agreement.copies import voters
from jobs.services.labelling.agreement.given import Given
from jobs.services.labelling.agreement.merging import electorate, reliabilities, votes_of
from jobs.services.labelling.agreement.quality import figures_of


def given(item: int, person: int, answer: dict[str, Any], made_at: float = 0.0) -> Given:
    return Given(item, person, answer, [], 1.0, None, made_at)


def rank(*ranks: int | None) -> dict[str, Any]:
    return {"kind": "rank", "ranks": list(ranks)}


def rate(rating: int | None) -> dict[str, Any]:
    return {"kind": "rate", "rating": rating, "flags": []}


def compare(preference: int) -> dict[str, Any]:
    return {"kind": "compare", "preference": preference}


def alpha_of(*answers: Sequence[dict[str, Any]]) -> Alpha:
    """Of the answers to each item."""
    rows = [given(item, person, answer) for item, row in enumerate(answers) for person, answer in enumerate(row)]
    (found,) = alphas(rows).values()
    return found


def test_alpha_by_hand() -> None:
    # Coincidences 1-1 and 2-2 twice, 1-2 twice: 1 - (2 / 6) / (18 / 30).
    found = alpha_of([rate(1), rate(1)], [rate(2), rate(2)], [rate(1), rate(2)], [rate(5), rate(None)])
    assert found == Alpha(pytest.approx(4 / 9), 3)
    assert alpha_of([rate(1), rate(1)], [rate(1), rate(2)]).value == pytest.approx(0)
    assert alpha_of([rank(1, 2), rank(2, 1)]).value == pytest.approx(-0.5)
    assert alpha_of([rank(1, 2, 3), rank(1, 2, 3)], [rank(2, None, 1), rank(2, 1, None)]).value == pytest.approx(1)


def test_alpha_does_not_depend_on_which_reply_is_listed_first() -> None:
    assert alpha_of([compare(-2), compare(-2)], [compare(-2), compare(-2)]).value == pytest.approx(1)
    assert alpha_of([compare(-2), compare(-1)]).value == alpha_of([compare(2), compare(1)]).value


def test_alpha_puts_ties_on_the_scale_of_whole_orders() -> None:
    """Two tied ones share the mean of their places; without that, 1 1 2 would put the third at the second place."""
    near = alpha_of([rank(1, 1, 2), rank(1, 2, 3)]).value
    far = alpha_of([rank(1, 2, 2), rank(2, 1, 3)]).value
    assert near is not None and far is not None and near > far


def test_alpha_is_unknown_without_overlap_or_without_a_difference() -> None:
    assert alpha_of([rate(1)], [rate(2)]) == Alpha(None, 0)
    assert alpha_of([rate(3), rate(3)]) == Alpha(None, 1)


@pytest.fixture(scope="module")
def copied() -> Pool:
    """A poor mind with three accounts, beside six careful people."""
    careful = [Mind(f"careful-{number}", CAREFUL, 0.8, f"c{number}") for number in range(6)]
    accounts = [Mind(f"poor-{number}", COPY, 0.62, "poor") for number in range(3)]
    return pool(Crowd([*careful, *accounts], None), seed=1, num_items=400)


def test_accounts_of_one_mind_count_as_one_voter(copied: Pool) -> None:
    found = voters(copied.given)
    assert {person: copy.of for person, copy in found.copies.items()} == {6: (7, 8), 7: (6, 8), 8: (6, 7)}
    assert [found.of(person) for person in range(9)] == [0, 1, 2, 3, 4, 5, 6, 6, 6]
    judges = electorate(copied.given)
    assert {
        vote.person for vote in judges.votes(0, [(7, rank(1, 2, 3, 4)), (8, rank(1, 2, 3, 4)), (0, rank(1, 2, 3, 4))])
    } == {0, 6}
    once = found.once(copied.given)
    assert len(once) == len({(each.item, found.of(each.person)) for each in copied.given})
    figures = {each.name: each for each in figures_of(copied.given, copied.names, judges)}
    assert figures["poor-1"].copy_of == "poor-0, poor-2" and 0 < (figures["poor-1"].copy_first or 0) < 1


def test_copies_do_not_make_each_other_reliable(copied: Pool) -> None:
    """Without the mending, two accounts that agree with each other have reliabilities of careful people."""
    votes = [vote for each in copied.given for vote in votes_of(each.item, each.person, each.answer)]
    apart = reliabilities(votes, {})
    judges = electorate(copied.given)
    assert min(apart[person] for person in (6, 7, 8)) > 0.75
    assert judges.reliability[6] == pytest.approx(0.62, abs=0.05)
    for person in range(6):
        assert judges.reliability[person] == pytest.approx(0.8, abs=0.06)


def test_the_one_who_copies_afterwards_is_seen() -> None:
    source = pool(crowd(12, 5, spammers=False), 5, num_items=300)
    later = [
        Given(each.item, 99, each.answer, each.order, 1.0, each.gold, each.made_at + 1000)
        for each in source.given
        if each.person == 3
    ]
    found = voters([*source.given, *later])
    assert (found.copies[3].of, found.copies[3].first_share) == ((99,), 1.0)
    assert (found.copies[99].of, found.copies[99].first_share) == ((3,), 0.0)


def test_people_who_agree_because_they_are_right_are_no_copies() -> None:
    """They give the same rankings of most items."""
    found = verdicts(5, 8, 300, spammers=False, worst=0.985, best=0.995)
    assert [each.accused for each in found] == [frozenset()] * 5
    # Without anybody else to compare with, nothing is known.
    both = [given(item, person, rank(1, 2, 3, 4)) for item in range(100) for person in (1, 2)]
    assert voters(both).copies == {}


def test_people_of_a_mediocre_crowd_are_not_taken_for_spammers() -> None:
    """They agree with each other on 57 % of pairs, as a spammer with careful people."""
    found = verdicts(3, 10, 300, spammers=False, worst=0.68, best=0.72)
    assert [each.accused for each in found] == [frozenset()] * 3
