"""Attention for short sequences equals torch's."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from actors.learning.documents import arguments
from actors.models import attention
from actors.models.attention import NAME, SHORT, ShortCausalAttention, attend
from actors.models.model import load_causal
from tests.tiny import tiny_llama


def inputs(length: int, *, heads: int = 6, groups: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Query, key and value in the memory layout of models, with adjacent heads."""
    generator = torch.Generator().manual_seed(length)
    made = [torch.randn(3, length, count, 16, generator=generator) for count in (heads, groups, groups)]
    return [tensor.to(dtype).transpose(1, 2).requires_grad_() for tensor in made]


def gradients(out: Tensor, of: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1.0, 1.0, out.numel(), dtype=out.dtype).view(out.shape)
    return list(torch.autograd.grad((out * weights).sum(), of))


@pytest.mark.parametrize("length", [1, 2, 57, SHORT])
@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 4), (3, 1)])
def test_gradients_are_those_of_torch(length: int, heads: int, groups: int) -> None:
    given = inputs(length, heads=heads, groups=groups)
    expected_out = scaled_dot_product_attention(*given, is_causal=True, scale=0.3, enable_gqa=True)
    out = ShortCausalAttention.apply(*given, 0.3)
    assert torch.equal(out, expected_out)
    for found, expected in zip(gradients(out, given), gradients(expected_out, given), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_values_may_have_another_head_size() -> None:
    query, key, _ = inputs(9)
    value = inputs(9)[2].detach()[..., :8].requires_grad_()
    given = [query, key, value]
    expected = gradients(scaled_dot_product_attention(*given, is_causal=True, scale=0.3, enable_gqa=True), given)
    for found, wanted in zip(gradients(ShortCausalAttention.apply(*given, 0.3), given), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_no_worse_than_twice_torchs_own_error() -> None:
    given = inputs(57, dtype=torch.bfloat16)
    exact = [tensor.detach().float().requires_grad_() for tensor in given]
    expected = gradients(scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True), exact)
    torchs = gradients(scaled_dot_product_attention(*given, is_causal=True, enable_gqa=True), given)
    ours = gradients(ShortCausalAttention.apply(*given, 0.25), given)
    for mine, theirs, true in zip(ours, torchs, expected, strict=True):
        assert (mine.float() - true).norm() < 2 * (theirs.float() - true).norm()


class Module(torch.nn.Module):
    is_causal = True
    num_key_value_groups = 3


@pytest.mark.parametrize("case", ["long", "mask", "not causal", "no gradient", "fp32"])
def test_what_it_is_not_made_for_is_left_to_torch(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShortCausalAttention, "apply", lambda *given: pytest.fail("used"))
    dtype = torch.float32 if case == "fp32" else torch.bfloat16
    query, key, value = inputs(SHORT + 1 if case == "long" else 5, dtype=dtype)
    mask = torch.zeros(3, 1, 5, 5, dtype=dtype) if case == "mask" else None
    options = {"is_causal": False} if case == "not causal" else {}
    with torch.set_grad_enabled(case != "no gradient"):
        out, _ = attend(Module(), query, key, value, mask, scaling=0.25, **options)
        is_causal = case in ("long", "no gradient", "fp32")
        expected = scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=0.25, enable_gqa=True)
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_a_loaded_model_uses_it_and_does_not_save_its_name(tmp_path: Path) -> None:
    model = load_causal(tiny_llama(tmp_path / "model"), torch.bfloat16)
    used: list[int] = []
    original = ShortCausalAttention.forward

    def counting(ctx: object, *given: object) -> Tensor:
        used.append(1)
        return original(ctx, *given)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShortCausalAttention, "forward", staticmethod(counting))
        model(input_ids=torch.ones(2, 9, dtype=torch.int64), use_cache=False).logits.sum().backward()
    assert len(used) == model.config.num_hidden_layers
    model.save_pretrained(tmp_path / "saved")
    assert NAME not in (tmp_path / "saved" / "config.json").read_text(encoding="utf-8")


def rows_by_the_contract(query_THK, key_TGK, value_TGK, *arguments, **options):
    """What torch documents of varlen_attn, row by row; arguments that its signature does not have are refused."""
    given = inspect.signature(varlen_attn).bind(query_THK, key_TGK, value_TGK, *arguments, **options).arguments
    sizes = given["cu_seq_q"].diff().tolist()
    assert given["cu_seq_q"].dtype == torch.int32 and max(sizes) == given["max_q"] == given["max_k"]
    assert given["window_size"] == (-1, 0), "causal"
    rows = zip(*(x.split(sizes) for x in (query_THK, key_TGK, value_TGK)), strict=True)
    found = [
        scaled_dot_product_attention(
            *(x.transpose(0, 1) for x in row), is_causal=True, scale=given["scale"], enable_gqa=given["enable_gqa"]
        )
        for row in rows
    ]
    return torch.cat(found, dim=1).transpose(0, 1)


@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 4)])
def test_one_call_for_the_rows_of_a_line_is_what_rows_alone_are(
    monkeypatch: pytest.MonkeyPatch, heads: int, groups: int
) -> None:
    given = [x[:1].detach().requires_grad_() for x in inputs(9, heads=heads, groups=groups)]
    line = {
        name: value
        for name, value in arguments([4, 1, 4], torch.device("cpu")).items()
        if "seq" in name or "length" in name
    }
    expected, _ = attend(Module(), *given, None, scaling=0.3, **line)
    monkeypatch.setattr(attention, "varlen_attn", rows_by_the_contract)
    monkeypatch.setattr(attention, "_has_kernel_for_rows", lambda query, value: True)
    found, _ = attend(Module(), *given, None, scaling=0.3, **line)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for one, other in zip(gradients(found, given), gradients(expected, given), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
