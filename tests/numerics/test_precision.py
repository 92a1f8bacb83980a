"""How exactly learners compute: the stated rule holds after a process has joined its group."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from actors.learning import distributed, precision
from tests.numerics.ranks import group


@pytest.fixture(autouse=True)
def _kept() -> Iterator[None]:
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    sums = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    fills = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fills
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = convolutions
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = sums


def test_learners_compute_without_tf32_and_add_bf16_in_fp32() -> None:
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    distributed.join(group())
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction


def test_algorithms_are_deterministic_where_a_model_has_them() -> None:
    assert precision.compute_the_same_bits(lambda: torch.ones(3) @ torch.ones(3))
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()

    def without() -> None:
        raise RuntimeError("histc_cuda does not have a deterministic implementation, but you set ...")

    assert not precision.compute_the_same_bits(without)
    assert torch.is_deterministic_algorithms_warn_only_enabled()


def test_other_errors_are_not_taken_for_it() -> None:
    def broken() -> None:
        raise RuntimeError("CUDA out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        precision.compute_the_same_bits(broken)
