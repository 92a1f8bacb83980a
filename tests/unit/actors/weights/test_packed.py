"""Weights packed by torch: read back to the bit, and multiplied as vLLM's own packed weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm import _custom_ops as vllm_ops
from vllm.platforms import current_platform

from actors.weights.packed import PackedWeight, _create, _is_packed_by_torch, _multiply, install, packed_weight
from actors.weights.sums.words import row_sums

SHAPES = [(96, 64), (515, 96), (64, 32), (5, 48), (1, 64)]

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM packs on CPUs")


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(autouse=True, scope="module")
def kernels() -> None:
    current_platform.import_kernels()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_equal_vllms_to_the_bit(shape: tuple[int, int]) -> None:
    weight, bias = random(*shape), random(shape[0])
    theirs, ours = _create(weight.t(), 32), PackedWeight(weight.t())
    for num_rows in (1, 2, 7, 48, 100):
        rows = random(num_rows, shape[1])
        for added in (None, bias):
            assert torch.equal(ours.multiply(rows, added), _multiply(theirs, rows, added))
    deep = random(3, 4, shape[1])
    assert torch.equal(ours.multiply(deep, None), _multiply(theirs, deep, None))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_read_to_the_bit_and_is_a_copy(shape: tuple[int, int]) -> None:
    weight = random(*shape)
    weight.view(torch.int32)[0, :3] = torch.tensor([0x7FC12345, 1, -(1 << 31)], dtype=torch.int32)  # NaN, subnormal, -0
    before = weight.clone()
    packed = PackedWeight(weight.t())
    assert torch.equal(packed.read().view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(960, 576), (576, 1536), (1024, 64)], ids=str)
def test_memory_in_panels_is_written_and_summed_as_rows(shape: tuple[int, int], dtype: torch.dtype) -> None:
    if not _is_packed_by_torch(dtype):
        pytest.skip(f"torch packs no {dtype} here")
    before, after = random(*shape).to(dtype), (random(*shape) * 3).to(dtype)
    packed = PackedWeight(before.t())
    height = packed.height
    if height is None:
        assert dtype == torch.bfloat16, "on CPUs with AVX2, AVX-512 and AMX oneDNN packs such shapes in panels"
        pytest.skip("oneDNN packs it otherwise here")
    assert shape[0] % height == 0
    assert torch.equal(packed.row_sums(), row_sums(before, 0))
    packed.write(height, after[height:])
    assert torch.equal(packed.read(), torch.cat([before[:height], after[height:]]))
    packed.write(0, after[:height])
    assert torch.equal(packed.row_sums(), row_sums(after, 0))
    rows = random(7, shape[1]).to(dtype)
    assert torch.equal(packed.multiply(rows, None), PackedWeight(after.t()).multiply(rows, None))


def test_other_shapes_are_not_taken_for_panels() -> None:
    """Their rows are cut between words, or padded."""
    for shape in ((515, 96), (5, 48), (64, 33)):
        weight = random(*shape)
        packed = PackedWeight(weight.t())
        if packed.height is not None:
            assert torch.equal(packed.row_sums(), row_sums(weight, 0))
    assert PackedWeight(random(64, 33).t()).height is None


def test_an_installed_layer_shows_its_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_ops, "create_onednn_mm", _create)
    monkeypatch.setattr(vllm_ops, "onednn_mm", _multiply)
    install()
    weight = random(96, 64)
    handler = vllm_ops.create_onednn_mm(weight.t(), 32)
    layer = SimpleNamespace(cpu_linear=lambda x, weight, bias: vllm_ops.onednn_mm(handler, x, bias))
    assert packed_weight(layer) is handler
    rows = random(3, 64)
    assert torch.equal(layer.cpu_linear(rows, None, None), _multiply(_create(weight.t(), 32), rows, None))
    assert packed_weight(SimpleNamespace(cpu_linear=torch.nn.functional.linear)) is None
    assert packed_weight(SimpleNamespace()) is None
