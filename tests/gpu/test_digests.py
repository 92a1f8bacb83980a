"""The digest of weights on a GPU is that of the same bytes on the host."""

from __future__ import annotations

import pytest
import torch

from actors.machine.devices import compute_device
from actors.weights.digest import copied_part, digest_part
from tests.unit.actors.weights.test_digest import DTYPES, FLOATS, random_tensor
from tests.unit.actors.weights.test_words import NAME, SHAPES, bits, with_oddities

WIDE = [(3, 150_000), (40_000, 72)]  # more bytes and more rows than one product takes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_digest_on_the_device_is_that_of_the_host(dtype: torch.dtype) -> None:
    for shape in [*SHAPES, *WIDE]:
        flat = random_tensor(shape, dtype).flatten()
        for first in (0, 1, len(flat) // 2):
            part = flat[first:]
            expected = digest_part(part, NAME, shape, first, (1,))
            assert digest_part(part.to(compute_device()), NAME, shape, first, (1,)) == expected, (shape, first)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_copy_on_the_device_is_that_of_the_host(dtype: torch.dtype) -> None:
    for shape in [(40, 72), (37, 67), (3, 130)]:
        flat = with_oddities(shape, dtype).view(-1)
        here, there = torch.empty_like(flat), torch.empty_like(flat, device=compute_device())
        expected = copied_part(flat, here, NAME, shape, 0)
        assert copied_part(flat.to(compute_device()), there, NAME, shape, 0) == expected
        assert bits(there.cpu()) == bits(here)
