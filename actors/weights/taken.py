"""Whether the workers of an engine together take all of every tensor that is sent: with tensor parallelism each takes
parts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from actors.weights.manifest import listed
from actors.weights.places import Places, View, refusal


@dataclass(frozen=True)
class Taken:
    """What one worker takes.

    Args:
        shapes: of all tensors that the trainer may send, by name.
        buffers: names of those that an engine may do without.
        views: by name, the parts that the worker keeps.
    """

    shapes: Mapping[str, tuple[int, ...]]
    buffers: frozenset[str]
    views: Mapping[str, frozenset[View]]


def views_of(places: Places) -> Mapping[str, frozenset[View]]:
    return {name: frozenset(place.sent for place in many) for name, many in places.items()}


def require_all_taken(workers: Sequence[Taken]) -> frozenset[str]:
    """Returns the names of the tensors that the engine needs.

    Raises:
        PublishError: names tensors of which elements arrive nowhere.
    """
    shapes, buffers = workers[0].shapes, workers[0].buffers
    views = {name: frozenset[View]().union(*(worker.views.get(name, ()) for worker in workers)) for name in shapes}
    needed = frozenset(name for name, taken in views.items() if taken or name not in buffers)
    lost = [name for name, shape in shapes.items() if name in needed and not _cover(views[name], prod(shape))]
    if lost:
        raise refusal(f"leaves out {listed(lost)}")
    return needed


def _cover(views: Collection[View], size: int) -> bool:
    """Whether each element of a tensor is in a view. Numbers of elements do not show it: views may overlap."""
    if not size or any(view.rows(size) == range(1) for view in views):
        return True
    taken = torch.zeros(size, dtype=torch.bool)
    for view in views:
        view.of(taken).fill_(True)
    return bool(taken.all())
