"""Crowds whose judgements are drawn in this process: how often careful people are accused."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.labelling.minds import NUM_REPLIES, Crowd, Mind, crowd, ranks_of, true_scores
from benchmarks.labelling.verdicts import Verdict, verdict
from jobs.services.labelling.agreement.given import Given
from jobs.services.labelling.agreement.quality import figures_of

GOLD_SHARE = 0.05
NUM_GOLD = 100


@dataclass(frozen=True)
class Pool:
    """`scores`: true ones, by item."""

    crowd: Crowd
    names: Mapping[int, str]
    scores: Mapping[int, Sequence[float]]
    given: Sequence[Given]


def pool(people: Crowd, seed: int, *, num_items: int, overlap: int = 3) -> Pool:
    """Each item is judged by `overlap` of the crowd; 5 % of everybody's tasks are gold items."""
    draw = random.Random(f"{seed} pool")
    scores = dict(enumerate(true_scores(num_items + NUM_GOLD, seed)))
    minds = dict(enumerate(people.minds))
    tasks = [(item, person) for item in range(num_items) for person in draw.sample(sorted(minds), overlap)]
    num_gold = min(NUM_GOLD, round(len(tasks) / len(minds) * GOLD_SHARE / (1 - GOLD_SHARE)))
    gold = range(num_items, num_items + NUM_GOLD)
    tasks += [(item, person) for person in minds for item in draw.sample(gold, num_gold)]
    given = [
        _given(minds[person], item, person, scores[item], draw, made_at=float(number), is_gold=item >= num_items)
        for number, (item, person) in enumerate(tasks)
    ]
    return Pool(people, {person: mind.name for person, mind in minds.items()}, scores, given)


def _given(
    mind: Mind,
    item: int,
    person: int,
    scores: Sequence[float],
    draw: random.Random,
    *,
    made_at: float,
    is_gold: bool,
) -> Given:
    order = draw.sample(range(NUM_REPLIES), NUM_REPLIES)
    answer = {"kind": "rank", "ranks": mind.ranks(item, scores, order)}
    gold = {"kind": "rank", "ranks": ranks_of(scores)} if is_gold else None
    return Given(item, person, answer, order, 10.0, gold, made_at)


def verdicts(
    num_pools: int, num_people: int, num_items: int, *, spammers: bool, worst: float, best: float
) -> list[Verdict]:
    """Of pools with the seeds 0, 1, ..."""
    found = []
    for seed in range(num_pools):
        drawn = pool(crowd(num_people, seed, spammers=spammers, worst=worst, best=best), seed, num_items=num_items)
        found.append(verdict(drawn.crowd, figures_of(drawn.given, drawn.names)))
    return found
