"""Simulated labellers with planted reliability, and items with a true order.

Replies have true scores from N(0, 1). A careful mind sees them with noise N(0, s²), so it orders two replies correctly
with probability 1/2 + arcsin(1 / √(1 + s²)) / π, which is solved for s.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

NUM_REPLIES = 4
CAREFUL, RANDOM, FIRST, COPY = "careful", "random", "first", "copy"
WORST, BEST = 0.72, 0.95  # share of pairs that careful minds order correctly


@dataclass(frozen=True)
class Mind:
    """Args:
    name: of the labeller.
    kind: careful; random; first: ranks replies as they are shown; copy: of the careful mind with the same seed.
    accuracy: share of pairs of replies that it orders correctly.
    seed: two minds with the same one see the same.
    """

    name: str
    kind: str
    accuracy: float
    seed: str

    def ranks(self, item: int, scores: Sequence[float], order: Sequence[int]) -> list[int]:
        """A rank of each reply by its index, 1 is the best. `order`: the index at each place of the page."""
        draw = random.Random(f"{self.seed} {item}")
        if self.kind == FIRST:
            return [order.index(reply) + 1 for reply in range(len(scores))]
        if self.kind == RANDOM:
            return ranks_of([draw.random() for _ in scores])
        noise = noise_of(self.accuracy)
        return ranks_of([score + draw.gauss(0, noise) for score in scores])


@dataclass(frozen=True)
class Crowd:
    """`minds`: careful ones by accuracy, then spammers; `source`: the name of the mind that is copied."""

    minds: Sequence[Mind]
    source: str | None
    by_name: Mapping[str, Mind] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_name", {mind.name: mind for mind in self.minds})


def crowd(num: int, seed: int, *, spammers: bool = True, worst: float = WORST, best: float = BEST) -> Crowd:
    """`num` minds; three of them are spammers: random, always first, and a copy of a careful one in the middle."""
    num_careful = num - 3 if spammers else num
    step = (best - worst) / (num_careful - 1)
    minds = [
        Mind(f"careful-{number:02}", CAREFUL, worst + number * step, f"{seed} {number}")
        for number in range(num_careful)
    ]
    if not spammers:
        return Crowd(minds, None)
    source = minds[num_careful // 2]
    spam = [Mind("random", RANDOM, 0.5, f"{seed} random"), Mind("first", FIRST, 0.5, f"{seed} first")]
    return Crowd([*minds, *spam, Mind("copy", COPY, source.accuracy, source.seed)], source.name)


def noise_of(accuracy: float) -> float:
    return 1 / math.tan(math.pi * (accuracy - 0.5))


def true_scores(num_items: int, seed: int) -> list[list[float]]:
    draw = random.Random(f"{seed} items")
    return [[draw.gauss(0, 1) for _ in range(NUM_REPLIES)] for _ in range(num_items)]


def ranks_of(scores: Sequence[float]) -> list[int]:
    order = sorted(range(len(scores)), key=lambda reply: -scores[reply])
    return [order.index(reply) + 1 for reply in range(len(scores))]
