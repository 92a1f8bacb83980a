"""Finds people with the same answers. They count as one voter: agreement with a copy of oneself says nothing.

Two people are one voter if they give the same whole rankings on more than 85 % of the replies that both ranked, and
agree on more pairs than two people as good as they are would by chance. How good they are follows from their agreement
with all others and with gold: independent people agree as the product of their correlations with the truth (Dawid and
Skene 1979), so the matrix of agreements has rank one, and copies stand out of it. Careful people, who agree because
they are right, do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import bdtrc

from jobs.services.labelling.agreement.given import Given, by_item, signs_of
from orchestrator.training.ranking import wilson_interval

_COPIED = 0.85  # share of the same rankings
_MIN_PAIRS = 3  # of replies of a ranking; shorter ones are the same by chance
_CHANCE = 0.05  # of one false pair in a store of careful people
_ROUNDS = 100
_GOLD = -1

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Copy:
    """`of`: others with the same answers. `first_share`: of the items that they share, how many this person judged
    before the other. Answers alone do not tell who of them copied."""

    of: tuple[int, ...]
    first_share: float


@dataclass(frozen=True)
class Voters:
    """`copies`: by person. `voter`: of each person in it, the first of those who count as one."""

    copies: Mapping[int, Copy]
    voter: Mapping[int, int]

    def of(self, person: int) -> int:
        return self.voter.get(person, person)

    def once(self, given: Iterable[Given]) -> list[Given]:
        """The judgements, but of people who count as one only the first of each item."""
        found = {(each.item, self.of(each.person)): each for each in reversed(list(given))}
        return list(reversed(found.values()))


def voters(given: Iterable[Given]) -> Voters:
    matrices = _matrices(given)
    same = {
        pair
        for pair in zip(*np.nonzero(np.triu(matrices.num_whole, 1)), strict=True)
        if 0 not in pair and wilson_interval(matrices.num_same[pair], int(matrices.num_whole[pair]))[0] > _COPIED
    }
    correlations = _correlations(matrices, same)
    return _joined(matrices, [pair for pair in sorted(same) if _is_beyond_chance(matrices, pair, correlations)])


@dataclass(frozen=True)
class _Matrices:
    """People by people, in the order of `ids`.

    Args:
        num_votes: pairs of replies that both ordered; `agreement`: on how many more they agree than disagree.
        num_whole: rankings of three and more replies by both; `num_same`: how many of them are equal.
        num_first: items that both judged, and the person of the row first.
        num_free: comparisons that determine the rankings of both: one less than replies.
    """

    ids: Sequence[int]
    num_votes: Floats
    agreement: Floats
    num_whole: Floats
    num_same: Floats
    num_first: Floats
    num_free: Floats


def _matrices(given: Iterable[Given]) -> _Matrices:
    found = list(given)
    ids = [_GOLD, *sorted({each.person for each in found})]
    place = {person: index for index, person in enumerate(ids)}
    sums = [np.zeros((len(ids), len(ids))) for _ in range(6)]
    for group in by_item(found).values():
        rows = [(place[each.person], signs, each.made_at) for each in group if (signs := signs_of(each.answer))]
        gold = signs_of(group[0].gold) if group[0].gold else ()
        rows += [(0, gold, np.inf)] if gold else []
        if len(rows) > 1:
            where = np.ix_(*[[row[0] for row in rows]] * 2)
            for total, more in zip(sums, _of_item(np.array([row[1] for row in rows], np.float64), rows), strict=True):
                total[where] += more
    for total in sums:
        np.fill_diagonal(total, 0)
    return _Matrices(ids, *sums)


def _of_item(signs: Floats, rows: Sequence[tuple[int, Sequence[int], float]]) -> Sequence[Floats]:
    ones = np.ones((len(rows), len(rows)))
    are_whole = ones * (signs.shape[1] >= _MIN_PAIRS)
    are_same = (signs[:, None] == signs[None]).all(axis=2)
    made_at = np.array([row[2] for row in rows])
    num_free = (np.sqrt(8 * signs.shape[1] + 1) - 1) / 2  # K - 1 of K (K - 1) / 2 pairs
    return (
        np.abs(signs) @ np.abs(signs).T,
        signs @ signs.T,
        are_whole,
        are_whole * are_same,
        are_whole * (made_at[:, None] < made_at[None]),
        are_whole * num_free,
    )


def _correlations(matrices: _Matrices, left_out: Iterable[tuple[int, int]]) -> Floats:
    """Of each person's votes with the truth, from agreement with everybody but those left out; gold is the truth.
    1 for those about whom nothing is known."""
    agreement, num_votes = matrices.agreement.copy(), matrices.num_votes.copy()
    for first, second in left_out:
        for cell in ((first, second), (second, first)):
            agreement[cell] = num_votes[cell] = 0
    return with_truth(agreement, num_votes, known=0)


def with_truth(agreement: Floats, num: Floats, *, known: int | None = None) -> Floats:
    """Correlation of each person with the truth; 1 for those about whom nothing is known.

    Args:
        agreement, num: people by people: sums of agreement, from -1 to 1 for each thing that both judged, and the
            number of those.
        known: the place of somebody who is always right.
    """
    found = np.full(len(agreement), 0.6)
    for _ in range(_ROUNDS):
        if known is not None:
            found[known] = 1.0
        weights = num @ found**2
        fresh = np.clip(np.divide(agreement @ found, weights, out=np.ones_like(found), where=weights > 0), 0.0, 1.0)
        found = (found + fresh) / 2  # alone it would swing between two solutions
    return found


def _is_beyond_chance(matrices: _Matrices, pair: tuple[int, int], correlations: Floats) -> bool:
    """Whether two people agree on more pairs than independent ones. The pairs of a ranking depend on each other: they
    count as one comparison less than it has replies."""
    share = (1 + matrices.agreement[pair] / matrices.num_votes[pair]) / 2
    expected = (1 + correlations[pair[0]] * correlations[pair[1]]) / 2
    trials = round(matrices.num_free[pair])
    num_pairs = np.count_nonzero(np.triu(matrices.num_whole, 1))
    return bool(bdtrc(round(share * trials) - 1, trials, expected) < _CHANCE / num_pairs)


def _joined(matrices: _Matrices, pairs: Sequence[tuple[int, int]]) -> Voters:
    group = list(range(len(matrices.ids)))
    for first, second in pairs:
        low, high = sorted((group[first], group[second]))
        group = [low if each == high else each for each in group]
    copies = {}
    for place, person in enumerate(matrices.ids):
        others = [other for other in range(len(group)) if other != place and group[other] == group[place]]
        if others:
            first, whole = matrices.num_first[place, others].sum(), matrices.num_whole[place, others].sum()
            copies[person] = Copy(tuple(matrices.ids[other] for other in others), float(first / whole))
    return Voters(copies, {person: matrices.ids[group[matrices.ids.index(person)]] for person in copies})
