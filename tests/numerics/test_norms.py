"""Norms with a custom backward equal autograd through transformers' norm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from actors.models.model import load_causal
from actors.models.norms import use_quick_norms
from tests.tiny import tiny_llama


def norm(dtype: torch.dtype) -> LlamaRMSNorm:
    module = LlamaRMSNorm(48, eps=1e-5).to(dtype)
    with torch.no_grad():
        module.weight.copy_(torch.linspace(-0.5, 2.0, 48))
    return module


def passed(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(output, gradient of the input, gradient of the weight)"""
    module.zero_grad()
    given = x.clone().requires_grad_()
    out = module(given)
    (out * torch.linspace(-1.0, 1.0, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    assert torch.equal(given, x), "the input was changed"
    return out.detach(), given.grad, module.weight.grad.clone()


@pytest.mark.parametrize("shape", [(3, 48), (2, 5, 48), (1, 1, 48)])
def test_gradients_are_autograds(shape: tuple[int, ...]) -> None:
    module, x = norm(torch.float32), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected = passed(module, x)
    use_quick_norms(module)
    assert "forward" in vars(module)
    found = passed(module, x)
    assert torch.equal(found[0], expected[0])
    for mine, autograds in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(mine, autograds, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_no_worse_than_autograd() -> None:
    x = torch.randn(4, 60, 48, generator=torch.Generator().manual_seed(2)).bfloat16()
    exact = passed(norm(torch.float32), x.float())
    module = norm(torch.bfloat16)
    autograds = passed(module, x)
    use_quick_norms(module)
    ours = passed(module, x)
    assert torch.equal(ours[0], autograds[0])
    for mine, theirs, true in zip(ours[1:], autograds[1:], exact[1:], strict=True):
        assert (mine.float() - true).norm() <= 1.1 * (theirs.float() - true).norm()


def test_a_norm_that_computes_something_else_is_left_alone() -> None:
    module = GemmaRMSNorm(48, eps=1e-5)  # its factor is 1 + weight, and its eps has another name
    renamed: Any = GemmaRMSNorm(48, eps=1e-5)
    renamed.variance_epsilon = 1e-5
    for kind in (module, renamed, nn.LayerNorm(48)):
        use_quick_norms(kind)
        assert "forward" not in vars(kind)


def test_a_loaded_model_uses_it_where_it_learns(tmp_path: Path) -> None:
    model = load_causal(tiny_llama(tmp_path / "model"), torch.float32)
    ids = torch.arange(9)[None]
    node = model.model(input_ids=ids, use_cache=False).last_hidden_state.grad_fn
    assert type(node).__name__ == "_RmsNormBackward"
    with torch.no_grad():
        scored = model.model(input_ids=ids, use_cache=False).last_hidden_state
    assert torch.equal(scored, model.model(input_ids=ids, use_cache=False).last_hidden_state)
