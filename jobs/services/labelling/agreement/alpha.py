"""Krippendorff's alpha of each kind of task: 1 is agreement, 0 what chance gives (Krippendorff 2018, chapter 12)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import krippendorff
import numpy as np

from jobs.services.labelling.agreement.given import RATED, Given, ranks_of
from orchestrator.training.ranking import spread

_MAX_UNITS = 50_000  # the package has a matrix of values by values for each; more units hardly change the figure


@dataclass(frozen=True)
class Alpha:
    """`value`: None if all gave the same values, or nobody judged what another one judged. `num_items`: judged by two
    or more."""

    value: float | None
    num_items: int


def alphas(given: Iterable[Given]) -> Mapping[str, Alpha]:
    """By kind of task: rank, compare, rate, review.

    The unit is a reply. Its value is ordinal: the rank, the rating, or in a comparison the strength of the preference
    for it. Both replies of a comparison are units, so that it does not matter which is listed first.
    """
    counts: dict[str, dict[tuple[int, int], Counter[float]]] = defaultdict(lambda: defaultdict(Counter))
    for each in given:
        for reply, value in _values(each.answer):
            counts[each.answer["kind"]][each.item, reply][value] += 1
    return {kind: _alpha(units) for kind, units in sorted(counts.items())}


def _alpha(units: Mapping[tuple[int, int], Counter[float]]) -> Alpha:
    shared = {unit: values for unit, values in units.items() if values.total() > 1}
    num_items = len({item for item, _ in shared})
    domain = sorted({value for values in shared.values() for value in values})
    if len(domain) < 2:
        return Alpha(None, num_items)
    counts = np.array([[values[value] for value in domain] for values in spread(list(shared.values()), _MAX_UNITS)])
    found = krippendorff.alpha(value_counts=counts, value_domain=domain, level_of_measurement="ordinal")
    return Alpha(float(found), num_items)


def _values(answer: Mapping[str, Any]) -> Iterator[tuple[int, float]]:
    """The value of each reply."""
    ranks = [answer["rating"]] if answer["kind"] in RATED else list(ranks_of(answer) or ())
    known = [rank for rank in ranks if rank is not None]
    for reply, rank in enumerate(ranks):
        if rank is not None:
            yield reply, _mid_rank(rank, known) if answer["kind"] == "rank" else float(rank)


def _mid_rank(rank: float, ranks: list[float]) -> float:
    """Tied replies share the mean of their places, so that ties and whole orders have one scale."""
    return sum(other < rank for other in ranks) + (ranks.count(rank) + 1) / 2
