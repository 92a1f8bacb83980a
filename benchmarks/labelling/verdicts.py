"""Compares the service's figures of simulated people with what was planted, and merged orders with the true ones."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.labelling.minds import CAREFUL, COPY, Crowd, ranks_of
from jobs.services.labelling.agreement.given import Given, by_item
from jobs.services.labelling.agreement.merging import Electorate, margins, ranked_pairs
from jobs.services.labelling.agreement.quality import SPAM, Figures, kendall_tau

_RESAMPLES = 2000


@dataclass(frozen=True)
class Verdict:
    """Args:
    found, missed: spammers; a copy is found if it is named beside the mind that it copies.
    accused: careful people with a spam score of a spammer, or named beside somebody with whom they share no mind.
    """

    found: frozenset[str]
    missed: frozenset[str]
    accused: frozenset[str]


def verdict(crowd: Crowd, figures: Iterable[Figures]) -> Verdict:
    found, accused = set(), set()
    for each in figures:
        mind = crowd.by_name[each.name]
        named = set((each.copy_of or "").split(", ")) - {""}
        false = {name for name in named if crowd.by_name[name].seed != mind.seed}
        if mind.kind == CAREFUL and ((each.spam or 0.0) >= SPAM or false):
            accused.add(each.name)
        if (named - false) if mind.kind == COPY else (each.spam or 0.0) >= SPAM:
            found.add(each.name)
    spammers = {mind.name for mind in crowd.minds if mind.kind != CAREFUL}
    return Verdict(frozenset(found & spammers), frozenset(spammers - found), frozenset(accused))


@dataclass(frozen=True)
class Taus:
    """Kendall's tau-b to the true order, by item: of the merged order, and of each single judgement by person."""

    merged: Mapping[int, float]
    singles: Mapping[int, Mapping[int, float]]

    def of(self, person: int) -> list[float]:
        return [found[person] for found in self.singles.values() if person in found]

    def people(self) -> list[int]:
        return sorted({person for found in self.singles.values() for person in found})

    def mean_single(self) -> float:
        """The mean over people of their mean over items."""
        return statistics.fmean(statistics.fmean(self.of(person)) for person in self.people())

    def best(self) -> int:
        """The person with the highest mean."""
        return max(self.people(), key=lambda person: statistics.fmean(self.of(person)))


def taus(given: Sequence[Given], scores: Mapping[int, Sequence[float]], judges: Electorate) -> Taus:
    """Of all items but gold ones. An item without a merged order has 0."""
    merged, singles, weights = {}, {}, judges.weights
    for item, rows in by_item(each for each in given if each.gold is None).items():
        truth = ranks_of(scores[item])
        votes = judges.votes(item, ((each.person, each.answer) for each in rows))
        pairs = ranked_pairs(margins(votes, weights))
        losses = [sum(worse == reply for _, worse in pairs) for reply in range(len(truth))]
        merged[item] = kendall_tau(losses, truth) or 0.0
        singles[item] = {each.person: kendall_tau(each.answer["ranks"], truth) or 0.0 for each in rows}
    return Taus(merged, singles)


def gains(found: Taus, seed: int) -> Mapping[str, tuple[float, float, float]]:
    """Merged less the mean single person, and less the best one on the items of that person: mean, and the 95 %
    interval of a bootstrap over items."""
    best = found.best()
    theirs = [(found.merged[item], single[best]) for item, single in found.singles.items() if best in single]
    against_best = np.array([merged - single for merged, single in theirs])
    people = found.people()
    table = np.full((len(found.singles), len(people)), np.nan)
    for row, single in enumerate(found.singles.values()):
        for person, tau in single.items():
            table[row, people.index(person)] = tau
    merged = np.array(list(found.merged.values()))
    draw = np.random.default_rng(seed)

    def interval(values: Sequence[float]) -> tuple[float, float]:
        low, high = np.quantile(values, [0.025, 0.975])
        return float(low), float(high)

    rows = [draw.integers(len(merged), size=len(merged)) for _ in range(_RESAMPLES)]
    against_mean = [merged[each].mean() - np.nanmean(np.nanmean(table[each], axis=0)) for each in rows]
    picked = [draw.choice(against_best, len(against_best)).mean() for _ in range(_RESAMPLES)]
    return {
        "mean": (statistics.fmean(found.merged.values()) - found.mean_single(), *interval(against_mean)),
        "best": (float(against_best.mean()), *interval(picked)),
    }
