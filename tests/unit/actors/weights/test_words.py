"""Compiled loops and int8 products have the same sums, for every dtype and address: read, copied, and in panels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from actors.weights import digest as digests
from actors.weights.canonical import canonical
from actors.weights.digest import copied_part, digest, digest_of_rows, digest_part
from actors.weights.sums import words
from tests.unit.actors.weights.test_digest import DTYPES, FLOATS, random_tensor

NAME = "model.layers.0.mlp.up_proj.weight"
SHAPES = [(40, 72), (37, 67), (3, 5), (1, 515), (130, 64), ()]


@pytest.fixture
def products_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where numba is not installed, and on GPUs."""
    monkeypatch.setattr(digests, "_words", lambda: None)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few bytes are worth a thread."""
    monkeypatch.setattr(words, "_THREAD_BYTES", 64)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_ways_have_the_same_digest(threads: None, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        tensor = random_tensor(shape, dtype)
        flat = tensor.flatten()
        cut = len(flat) // 3
        parts = [(tensor, 0), (flat[cut:], cut), *([(tensor[..., 1:], 1)] if shape else [])]
        by_words, by_products = [], []
        for part, offset in parts:
            by_words.append(digest_part(part, NAME, shape, offset))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(digests, "_words", lambda: None)
                by_products.append(digest_part(part, NAME, shape, offset))
        assert by_words == by_products, shape


@pytest.mark.usefixtures("products_only")
def test_products_have_the_one_layout_that_cublas_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply, shapes = torch._int_mm, set()

    def strict(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        rows, size = left.shape
        assert rows > 16 and size % 8 == 0 and right.shape == (size, 40)
        assert (left.stride(), right.stride()) == ((size, 1), (1, size))
        assert not left.data_ptr() % 16 and not right.data_ptr() % 16
        shapes.add((rows, size))
        return multiply(left, right)

    expected = {}
    for patch in (None, strict):
        if patch is not None:
            monkeypatch.setattr(torch, "_int_mm", patch)
        for dtype in DTYPES:
            for shape in SHAPES:
                flat = random_tensor(shape, dtype).flatten()
                for first in (0, 1, len(flat) // 2):
                    found = digest_part(flat[first:], NAME, shape, first, (1,))
                    assert expected.setdefault((dtype, shape, first), found) == found
    assert len(shapes) > 10


def with_oddities(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """With zeros of both signs, subnormals, infinities and NaN."""
    tensor = random_tensor(shape, dtype)
    if dtype.is_floating_point and dtype.itemsize > 1:
        tiny = torch.finfo(dtype).tiny
        odd = torch.tensor([0.0, -0.0, tiny, -tiny, tiny / 2, -tiny / 4, torch.inf, -torch.inf, torch.nan]).to(dtype)
        flat = tensor.view(-1)
        flat[::3] = odd.repeat(-(-len(flat) // 3) // len(odd) + 1)[: len(flat[::3])]
    return tensor


def bits(tensor: torch.Tensor) -> list[int]:
    found: list[int] = tensor.contiguous().view(-1).view(torch.uint8).tolist()
    return found


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(40, 72), (37, 67), (5,), (3, 130)], ids=str)
def test_a_copy_is_canonical_and_has_its_digest(threads: None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    flat = with_oddities(shape, dtype).view(-1)
    for start, end in ((0, len(flat)), (1, len(flat)), (len(flat) // 2, len(flat)), (0, 3)):
        out = torch.full_like(flat[start:end], 7)
        found = copied_part(flat[start:end], out, NAME, shape, start)
        assert bits(out) == bits(canonical(flat[start:end]))
        assert found == digest_part(out, NAME, shape, start, (1,))


@pytest.mark.usefixtures("products_only")
def test_a_copy_without_compiled_loops_is_the_same() -> None:
    flat = with_oddities((37, 67), torch.bfloat16).view(-1)
    out = torch.empty_like(flat)
    assert copied_part(flat, out, NAME, (37, 67), 0) == digest(canonical(flat).view(37, 67), NAME)
    assert bits(out) == bits(canonical(flat))


@pytest.mark.parametrize("height", [1, 3, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_written_into_panels_lie_and_sum_as_rows(threads: None, height: int, dtype: torch.dtype) -> None:
    tensor = random_tensor((5 * height, 88), dtype)
    size = 88 * dtype.itemsize // 4
    memory = np.zeros(5 * height * size, np.uint32)
    panels = words.Panels(memory, height, size)
    panels.fill(2 * height, tensor[2 * height :])
    assert not memory[: 2 * height * size].any()
    panels.fill(0, tensor[: 2 * height])
    expected = tensor.view(torch.int32).view(5, height, size).transpose(1, 2)
    assert np.array_equal(memory.reshape(5, size, height), expected.numpy().view(np.uint32))
    assert torch.equal(panels.row_sums(), words.row_sums(tensor, 0))
    some = panels.row_sums()[height : 3 * height]
    whole = (9 * height, 88)
    part = digest_part(tensor[height : 3 * height], NAME, whole, 4 * height * 88)
    assert digest_of_rows(some, 4 * height, NAME, dtype, whole) == part
