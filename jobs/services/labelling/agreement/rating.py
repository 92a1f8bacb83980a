"""How well people rate and review: agreement with others on the same texts.

Somebody who always gives the same rating is near to everybody's ratings, so what counts is correlation. That of two
independent people is the product of their correlations with the truth, as in copies.py: of three people and more, each
one's follows.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from jobs.services.labelling.agreement.copies import Voters, with_truth
from jobs.services.labelling.agreement.given import RATED, Given, by_item
from jobs.services.labelling.reviewing import REVIEW, rejects

_SURE = 3.0  # standard errors by which others agree beyond chance; else they can't measure anybody
_LEAST_VARIANCE = 1e-9

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rater:
    """None: too little is known.

    Args:
        with_others: mean correlation with the ratings of others; 0 of somebody who always gives the same.
        reliability: estimated probability to order two texts as the truth does. Known where two others or more agree
            with each other.
        evidence: number of comparisons that tell as much about it.
        with_majority: share of reviews that reject or accept as the majority of the other reviews of the text.
    """

    with_others: float | None = None
    reliability: float | None = None
    evidence: float = 0.0
    with_majority: float | None = None


def raters(given: Iterable[Given], voters: Voters) -> Mapping[int, Rater]:
    """By person, of those who rated or reviewed. People who count as one voter are not compared with each other."""
    found = [each for each in given if each.answer["kind"] in RATED]
    ids = sorted({each.person for each in found})
    is_other = np.array([[voters.of(one) != voters.of(other) for other in ids] for one in ids], bool)
    correlations, shared = _correlations(found, ids, is_other)
    correlation = with_truth(shared * correlations, shared)
    majorities, nums = _with_majority(found, voters), _num_shared(found, voters)
    return {
        person: replace(
            _rater(place, correlations, shared, correlation, nums[person]), with_majority=majorities.get(person)
        )
        for place, person in enumerate(ids)
    }


def _rater(place: int, correlations: Floats, shared: Floats, truth: Floats, num: int) -> Rater:
    """`num`: texts that others rated too."""
    weights = shared[place]
    if not weights.any():
        return Rater()
    with_others = float(np.average(correlations[place], weights=weights))
    others = np.delete(np.arange(len(weights)), place)
    among = np.ix_(others, others)
    if (shared * correlations)[among].sum() / 2 <= _SURE * math.sqrt(shared[among].sum() / 2):
        return Rater(with_others)
    # Of normal values with this correlation, the share of pairs in the same order (Sheppard 1899), and its variance.
    reliability = 0.5 + math.asin(truth[place]) / math.pi
    evidence = math.pi**2 / 4 * float(weights @ truth**2)
    return Rater(with_others, reliability, min(evidence, num))


def _num_shared(given: Sequence[Given], voters: Voters) -> Counter[int]:
    found: Counter[int] = Counter()
    for group in by_item(each for each in given if each.answer["rating"] is not None).values():
        if len({voters.of(each.person) for each in group}) > 1:
            found.update(each.person for each in group)
    return found


def _correlations(given: Sequence[Given], ids: Sequence[int], is_other: npt.NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """People by people: the correlation of their ratings of the same texts, and the number of those. Each kind of task
    has its own means."""
    covariances, variances, shared = (np.zeros((len(ids), len(ids))) for _ in range(3))
    for kind in RATED:
        ratings, is_rated = _ratings([each for each in given if each.answer["kind"] == kind], ids)
        num = is_rated @ is_rated.T * is_other
        sums = ratings @ is_rated.T
        covariances += (ratings @ ratings.T - sums * sums.T / np.maximum(num, 1)) * is_other
        variances += (ratings**2 @ is_rated.T - sums**2 / np.maximum(num, 1)) * is_other
        shared += num
    scale = np.sqrt(np.maximum(variances * variances.T, 0.0))
    return np.divide(covariances, scale, out=np.zeros_like(scale), where=scale > _LEAST_VARIANCE), shared


def _ratings(given: Sequence[Given], ids: Sequence[int]) -> tuple[Floats, Floats]:
    """People by texts: the rating, 0 without one, and whether there is one."""
    rows = {person: row for row, person in enumerate(ids)}
    columns = {item: column for column, item in enumerate(sorted({each.item for each in given}))}
    ratings, is_rated = np.zeros((len(rows), len(columns))), np.zeros((len(rows), len(columns)))
    for each in given:
        if each.answer["rating"] is not None:
            cell = rows[each.person], columns[each.item]
            ratings[cell], is_rated[cell] = each.answer["rating"], 1.0
    return ratings, is_rated


def _with_majority(given: Sequence[Given], voters: Voters) -> Mapping[int, float]:
    """By person. Texts on which the others are divided do not count."""
    equal: dict[int, list[bool]] = {}
    for group in by_item(each for each in given if each.answer["kind"] == REVIEW).values():
        for each in group:
            others = [rejects(row.answer) for row in group if voters.of(row.person) != voters.of(each.person)]
            if 2 * sum(others) != len(others):
                is_rejected = 2 * sum(others) > len(others)
                equal.setdefault(each.person, []).append(rejects(each.answer) == is_rejected)
    return {person: statistics.fmean(found) for person, found in equal.items()}
