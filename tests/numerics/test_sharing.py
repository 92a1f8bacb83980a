"""Rows with a shared prompt must equal separate rows, in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, GPT2Config, MistralConfig

from actors.learning.heads import PolicyModel
from actors.learning.packing import token_rows
from actors.learning.sharing import bundles, can_share, owners, visible
from actors.models.attention import SHORT_MASKED, ShortCausalAttention
from actors.models.model import load_causal
from tests.numerics.decoders import ignore, refuse
from tests.tiny import tiny_llama

CPU = torch.device("cpu")
PROMPTS = [[5, 6, 7, 8]] * 3 + [[9, 10]] + [[5, 6, 7, 8, 9, 10]] * 2
RESPONSES = [[11, 12, 13], [14], [15, 16, 17, 18], [19, 20], [21, 22], [23, 24, 25]]


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("causal"), tied=True)


def learned(model: PolicyModel, *, shared: bool) -> tuple[Tensor, list[Tensor]]:
    """(log-probs and entropies by row, gradients of a sum with a different weight per token)"""
    rows = token_rows(PROMPTS, RESPONSES)
    micro = rows.pack_lines(rows.bundles(longest=64, shared=shared), CPU)
    assert bool(micro.shared) == shared
    assert micro.rows == tuple(range(len(PROMPTS)))
    logprobs_N, entropy_N = model(micro)
    both = torch.cat([logprobs_N, entropy_N])
    (both * torch.linspace(-1.0, 2.0, len(both))).sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return both.detach(), gradients


def test_a_shared_prompt_changes_neither_logprobs_nor_gradients(causal: Path) -> None:
    model = PolicyModel(load_causal(causal, torch.float32), temperature=0.7)
    (apart, expected), (shared, gradients) = learned(model, shared=False), learned(model, shared=True)
    torch.testing.assert_close(shared, apart, rtol=1e-5, atol=1e-6)
    for found, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_each_sees_its_prompt_and_itself() -> None:
    owner, position = owners(2, [2, 1], 6)
    assert owner.tolist() == [0, 0, 1, 1, 2, -1]
    assert position.tolist() == [0, 1, 2, 3, 2, 0]
    assert visible(torch.from_numpy(owner)[None])[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("length", [7, 150, SHORT_MASKED])
def test_masked_gradients_are_those_of_torch(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    given = [torch.randn(2, count, length, 16, generator=generator).requires_grad_() for count in (6, 2, 2)]
    parts = [length // 3, length - 2 - length // 3]
    mask = visible(torch.from_numpy(np.stack([owners(2, parts, length)[0]] * 2)))
    weights = torch.randn(2, 6, length, 16, generator=generator)
    plain = scaled_dot_product_attention(*given, attn_mask=mask, scale=0.3, enable_gqa=True)
    ours = ShortCausalAttention.apply(*given, 0.3, mask)
    assert torch.equal(ours, plain)
    expected = torch.autograd.grad((plain * weights).sum(), given)
    for found, wanted in zip(torch.autograd.grad((ours * weights).sum(), given), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 400), st.integers(1, 6)), max_size=5), st.integers(1, 4000))
def test_lines_hold_every_row_once_in_order_and_no_more_than_they_may(
    groups: list[tuple[int, int, int]], longest: int
) -> None:
    texts = [(np.full(token, token), np.full(length + i, 7)) for token, length, count in groups for i in range(count)]
    lines = bundles([prompt for prompt, _ in texts], [response for _, response in texts], longest=longest)
    assert [row for line in lines for row in line] == list(range(len(texts)))
    for line in lines:
        assert len({texts[row][0].tobytes() for row in line}) == 1
        tokens = len(texts[line[0]][0]) + sum(len(texts[row][1]) for row in line)
        assert len(line) == 1 or tokens <= longest


def test_what_would_cost_more_together_stays_apart() -> None:
    prompt, short, long = np.arange(100), np.arange(50), np.arange(3000)
    assert bundles([prompt] * 4, [short] * 4, longest=10**6) == [(0, 1, 2, 3)]
    assert bundles([prompt] * 4, [short] * 4, longest=250) == [(0, 1), (2, 3)]
    assert bundles([prompt] * 4, [long] * 4, longest=10**6) == [(0,), (1,), (2,), (3,)]


def model_of(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def test_models_with_absolute_positions_can_share() -> None:
    assert can_share(model_of(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64)))


def test_models_with_windows_are_not_asked() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    assert not can_share(model_of(MistralConfig(**sizes, **heads, sliding_window=16)))
    assert can_share(model_of(MistralConfig(**sizes, **heads, sliding_window=None)))


@pytest.mark.parametrize("ignored", ["attention_mask", "position_ids"])
def test_a_model_that_ignores_what_it_is_told_is_found_out(
    causal: Path, monkeypatch: pytest.MonkeyPatch, ignored: str
) -> None:
    model = load_causal(causal, torch.float32)
    assert can_share(model)
    ignore(monkeypatch, model, ignored)
    assert not can_share(model)


def test_a_model_that_refuses_a_mask_is_left_alone(causal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_causal(causal, torch.float32)
    refuse(monkeypatch, model)
    assert not can_share(model)
