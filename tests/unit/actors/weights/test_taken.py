"""The workers of an engine must take every element of a tensor between them: worked by hand."""

from __future__ import annotations

import pytest

from actors.weights.places import View
from actors.weights.taken import Taken, require_all_taken
from orchestrator.errors import PublishError

SHAPE = (4, 6)
UPPER, LOWER = View((2, 6), (6, 1), 0), View((2, 6), (6, 1), 12)
LEFT, RIGHT = View((4, 3), (6, 1), 0), View((4, 3), (6, 1), 3)
ALL, TRANSPOSED = View((4, 6), (6, 1), 0), View((6, 4), (1, 6), 0)


def needed(*workers: set[View], buffers: frozenset[str] = frozenset()) -> frozenset[str]:
    taken = [Taken({"w": SHAPE}, buffers, {"w": frozenset(views)} if views else {}) for views in workers]
    return require_all_taken(taken)


@pytest.mark.parametrize(
    "workers",
    [
        ({ALL},),
        ({TRANSPOSED},),
        ({ALL}, {ALL}),
        ({ALL}, set()),
        ({UPPER}, {LOWER}),
        ({LEFT}, {RIGHT}),
        ({UPPER, LOWER},),
        ({View((3, 6), (6, 1), 0)}, {View((3, 6), (6, 1), 6)}),  # they overlap
    ],
)
def test_parts_of_all_workers_make_up_the_tensor(workers: tuple[set[View], ...]) -> None:
    assert needed(*workers) == {"w"}


@pytest.mark.parametrize(
    "workers",
    [
        (set(),),
        ({UPPER},),
        ({UPPER}, {UPPER}),
        ({LEFT}, {LEFT}),
        ({UPPER}, {LEFT}),
        # As many elements as the tensor has, but one row comes twice and one never.
        ({View((2, 6), (6, 1), 0), View((1, 6), (6, 1), 6)}, {View((1, 6), (6, 1), 12)}),
        ({View((4, 6), (0, 1), 0)},),
    ],
)
def test_elements_that_no_worker_takes_are_refused(workers: tuple[set[View], ...]) -> None:
    with pytest.raises(PublishError, match="vLLM's model leaves out w, so a publish could not be proved"):
        needed(*workers)


def test_an_engine_may_do_without_a_buffer_but_not_with_a_part_of_it() -> None:
    assert needed(set(), set(), buffers=frozenset("w")) == frozenset()
    with pytest.raises(PublishError, match="leaves out w"):
        needed({UPPER}, set(), buffers=frozenset("w"))


def test_a_scalar_and_an_empty_tensor_are_taken() -> None:
    shapes: dict[str, tuple[int, ...]] = {"scalar": (), "empty": (0, 3)}
    taken = Taken(shapes, frozenset(), {"scalar": frozenset({View((), (), 0)})})
    assert require_all_taken([taken, taken]) == {"scalar", "empty"}
