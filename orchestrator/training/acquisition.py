"""Which items are worth a person's judgement: what a judgement would tell about the reward, and how far the judged
items cover the space of features (docs/adr/0026-what-to-ask.md).

Shapes: N items, K replies of an item, H heads, D features, M items that have been judged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from orchestrator.prompts import derive_seed

Numbers = npt.NDArray[np.float64]
ACTIVE, CONTROL = "active", "control"
COMPONENTS = 16  # distances in more dimensions than this hardly differ
_FLOOR = 1e-9  # distance of equal items, which have no logarithm otherwise


@dataclass(frozen=True)
class Choice:
    """An item that people shall judge.

    Args:
        index: of the item.
        arm: ACTIVE, or CONTROL: drawn at random from all items.
        why: `information` of its judgement, and for the active arm its `novelty`, as they were when it was chosen;
            empty without a reward model.
    """

    index: int
    arm: str
    why: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Signals:
    """What a reward model with several heads says about items.

    Args:
        information_N: see `information`.
        features_ND: states of its trunk, one for each item.
        judged_MD: the same of items that are judged already, or are about to be.
    """

    information_N: Numbers
    features_ND: Numbers
    judged_MD: Numbers | None = None


def information(scores_KH: npt.ArrayLike) -> float:
    """What comparing two of the replies tells about which head is right, in nats, as the mean over pairs: the mutual
    information of the answer and the head (BALD: Houlsby 2011, eq. 2), with Bradley-Terry answers. At most ln 2; 0 for
    one head, and for replies on whose difference all heads agree. A constant added to a head's scores changes nothing.
    """
    scores = np.asarray(scores_KH, np.float64)
    first, second = np.triu_indices(len(scores), k=1)
    if not len(first):
        return 0.0
    chances_PH = 0.5 * (1.0 + np.tanh(0.5 * (scores[first] - scores[second])))
    found = _entropy(chances_PH.mean(-1)) - _entropy(chances_PH).mean(-1)
    return max(float(found.mean()), 0.0)


def _entropy(chances: Numbers) -> Numbers:
    """Of a coin, in nats."""
    inside = np.clip(chances, 1e-300, 1.0)
    outside = np.clip(1.0 - chances, 1e-300, 1.0)
    found: Numbers = -(chances * np.log(inside) + (1.0 - chances) * np.log(outside))
    return found


def knn_entropy(points_ND: Numbers, neighbour: int = 1) -> float:
    """Differential entropy of the distribution of the points, in nats, by the distance of each to its k-th nearest
    neighbour (Kozachenko and Leonenko 1987; Kraskov 2004, eq. 20). -inf if k + 1 points are equal.

    Raises:
        ValueError: no more points than `neighbour`.
    """
    num, dims = points_ND.shape
    if num <= neighbour:
        raise ValueError(f"{num} points have no neighbour number {neighbour}")
    radii_N = np.array([np.partition(distances(points_ND, point), neighbour)[neighbour] for point in points_ND])
    ball = 0.5 * dims * math.log(math.pi) - math.lgamma(0.5 * dims + 1.0)
    with np.errstate(divide="ignore"):
        found: float = _harmonic(num) - _harmonic(neighbour) + ball + dims * float(np.log(radii_N).mean())
    return found


def _harmonic(number: int) -> float:
    """ψ(number) + γ."""
    return math.fsum(1.0 / each for each in range(1, number))


def distances(points_ND: Numbers, point_D: Numbers) -> Numbers:
    """Euclidean, of each point to one."""
    found: Numbers = np.sqrt(np.square(points_ND - point_D).sum(-1))
    return found


def components(features_ND: Numbers, num: int = COMPONENTS) -> Numbers:
    """The first principal components of each point, each with variance 1; fewer if the points span less. Components
    of equal variance keep a few directions in which states of language models are huge from deciding all distances.
    """
    centred = features_ND - features_ND.mean(0)
    values, vectors = np.linalg.eigh(centred.T @ centred / max(len(centred), 1))
    order = np.argsort(values)[::-1][:num]
    kept = order[values[order] > 1e-9 * max(float(values[order[0]]), 1e-300)]
    found: Numbers = centred @ (vectors[:, kept] / np.sqrt(values[kept]))
    return found


def choose(
    num_items: int,
    signals: Signals | None,
    *,
    budget: int,
    control_share: float,
    seed: int,
    diversity: float = 1.0,
) -> list[Choice]:
    """Items for people to judge, in random order, so that neither arm is judged earlier, or by other people.

    The control arm is drawn first, from all items. The active arm takes, one after the other, the item with the most
    standardised information plus `diversity` times its standardised novelty: the logarithm of its distance to the
    nearest item that is judged or chosen, by which the entropy of their distribution grows (see knn_entropy).

    Args:
        signals: None: there is no reward model yet, and all are drawn at random.
        budget: number of items; all, if there are fewer.
        control_share: 0 to 1, rounded up to whole items. Where nothing is judged yet, one item at least is drawn.
    """
    generator = np.random.default_rng(derive_seed("acquisition", seed))
    order = generator.permutation(num_items)
    count = min(budget, num_items)
    num_control = count if signals is None else _num_control(signals, control_share, count)
    drawn = order[:num_control]
    chosen = [Choice(int(index), CONTROL, _why(signals, index)) for index in drawn]
    if signals is not None and num_control < count:
        chosen += _active(signals, order, num_control, count, diversity)
    return [chosen[place] for place in generator.permutation(len(chosen))]


def _num_control(signals: Signals, share: float, count: int) -> int:
    least = 0 if signals.judged_MD is not None and len(signals.judged_MD) else 1
    return min(max(math.ceil(share * count), least), count)


def _why(signals: Signals | None, index: int) -> Mapping[str, float]:
    return {} if signals is None else {"information": float(signals.information_N[index])}


def _active(
    signals: Signals, order: npt.NDArray[np.int64], num_control: int, count: int, diversity: float
) -> list[Choice]:
    """Of equal items the first in `order`, of which the first `num_control` are taken."""
    judged = signals.features_ND[:0] if signals.judged_MD is None else signals.judged_MD
    points = components(np.concatenate([signals.features_ND[order], judged]))
    free, taken = points[num_control : len(order)], np.concatenate([points[:num_control], points[len(order) :]])
    left = order[num_control:]
    nearest = np.full(len(free), np.inf)
    for point in taken:
        nearest = np.minimum(nearest, distances(free, point))
    informative = _standardised(signals.information_N[left])
    unit = _spread(_log(nearest[nearest > _FLOOR]))
    is_free = np.ones(len(left), np.bool_)
    found = []
    for _ in range(count - num_control):
        novelty = _log(nearest)
        place = int(np.argmax(np.where(is_free, informative + diversity * novelty / unit, -np.inf)))
        found.append(Choice(int(left[place]), ACTIVE, {**_why(signals, left[place]), "novelty": float(novelty[place])}))
        is_free[place] = False
        nearest = np.minimum(nearest, distances(free, free[place]))
    return found


def _log(values: Numbers) -> Numbers:
    found: Numbers = np.log(np.maximum(values, _FLOOR))
    return found


def _standardised(values: Numbers) -> Numbers:
    found: Numbers = (values - values.mean()) / _spread(values)
    return found


def _spread(values: Numbers) -> float:
    """Their standard deviation; 1 if all are equal."""
    found = float(values.std()) if len(values) else 0.0
    return found if found > 1e-12 else 1.0
