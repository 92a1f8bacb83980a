"""Rows in one line without padding must equal separate rows, in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from actors.learning.distributed import Group
from actors.learning.documents import arguments, can_pack
from actors.learning.heads import PolicyModel
from actors.learning.objectives.losses import likelihood_loss
from actors.learning.packing import TokenRows, token_rows
from actors.models.model import load_causal
from actors.training.language_model import LearnedRows
from tests.families import FAMILIES, tiny_folder
from tests.numerics.decoders import ignore, refuse
from tests.tiny import tiny_llama

CPU = torch.device("cpu")
PROMPTS = [[5, 6, 7, 8], [9], [], [9, 10], [5, 6]]
RESPONSES = [[11, 12, 13], [14], [15, 16, 17, 18], [19, 20], [23, 24, 25]]
# Windows, states that run over the whole line, attention of their own, or bounds that do not reach the kernel.
NOT_PACKED = {
    "Mistral",
    "Gemma 2",
    "Gemma 3",
    "Cohere 2",
    "EXAONE 4",
    "GPT-Neo",
    "GPT-J",
    "BLOOM",
    "MPT",
    "Falcon",
    "StableLM",
    "Nemotron",
    "Falcon-H1",
    "RecurrentGemma",
    "Mamba",
}


def rows(*, is_packed: bool) -> TokenRows:
    found = token_rows(PROMPTS, RESPONSES)
    found.is_packed = is_packed
    return found


def learned(model: PolicyModel, *, is_packed: bool) -> tuple[Tensor, list[Tensor]]:
    """(log-probs and entropies by row, gradients of a sum with a different weight per token)"""
    micro = rows(is_packed=is_packed).pack(range(len(PROMPTS)), CPU)
    assert micro.input_ids_BT.shape == ((1, 22) if is_packed else (5, 7))
    logprobs_N, entropy_N = model(micro)
    both = torch.cat([logprobs_N, entropy_N])
    (both * torch.linspace(-1.0, 2.0, len(both))).sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return both.detach(), gradients


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_rows_have_the_logprobs_and_gradients_of_separate_rows(name: str, tmp_path: Path) -> None:
    causal = load_causal(tiny_folder(name, tmp_path), torch.float32)
    assert can_pack(causal) == (name not in NOT_PACKED)
    if name in NOT_PACKED:
        return
    model = PolicyModel(causal, temperature=0.7)
    (apart, expected), (packed, gradients) = learned(model, is_packed=False), learned(model, is_packed=True)
    torch.testing.assert_close(packed, apart, rtol=1e-5, atol=1e-5)
    for found, wanted in zip(gradients, expected, strict=True):
        assert (found - wanted).norm() <= 1e-4 * wanted.norm() + 1e-6


def test_every_row_begins_at_position_zero() -> None:
    found = arguments([2, 1, 3], CPU)
    assert found["position_ids"].tolist() == [[0, 1, 0, 0, 1, 2]]
    assert found["cu_seq_lens_q"].tolist() == [0, 2, 3, 6] and found["max_length_k"] == 3


def test_packed_tokens_are_those_of_the_rows_end_to_end() -> None:
    micro = rows(is_packed=True).pack([3, 1, 0], CPU)
    assert micro.input_ids_BT.tolist() == [[9, 10, 19, 20, 9, 14, 5, 6, 7, 8, 11, 12, 13]]
    assert micro.rows == (3, 1, 0) and micro.targets_N.tolist() == [19, 20, 14, 11, 12, 13]
    assert micro.state_index_N.tolist() == [1, 2, 4, 9, 10, 11]
    assert micro.last_index_B.tolist() == [3, 5, 12]


def test_a_row_alone_is_what_it_was() -> None:
    packed, padded = (rows(is_packed=is_packed).pack([0], CPU) for is_packed in (True, False))
    assert torch.equal(packed.input_ids_BT, padded.input_ids_BT) and not packed.shared


@pytest.mark.parametrize(("name", "ignored"), [("Llama", "cu_seq_lens_q"), ("GPT-2", "position_ids")])
def test_a_model_that_ignores_where_rows_begin_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, ignored: str
) -> None:
    model = load_causal(tiny_folder(name, tmp_path), torch.float32)
    assert can_pack(model)
    ignore(monkeypatch, model, ignored)
    assert not can_pack(model)


def test_a_model_that_refuses_the_arguments_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_causal(tiny_llama(tmp_path), torch.float32)
    refuse(monkeypatch, model)
    assert not can_pack(model)


@pytest.mark.parametrize("length", [40, 150])
def test_in_bf16_each_row_has_the_kernel_of_its_length(tmp_path: Path, length: int) -> None:
    model = PolicyModel(load_causal(tiny_llama(tmp_path), torch.bfloat16), temperature=1.0)
    long = token_rows([[5], [6, 7]], [list(range(10, 10 + length)), [8, 9, 10]])
    found = []
    for is_packed in (False, True):
        long.is_packed = is_packed
        logprobs_N, _ = model(long.pack([0, 1], CPU))
        logprobs_N.sum().backward()
        gradients = [parameter.grad.float() for parameter in model.parameters() if parameter.grad is not None]
        found.append((logprobs_N.detach(), torch.cat([gradient.flatten() for gradient in gradients])))
        model.zero_grad()
    (apart, expected), (packed, gradient) = found
    assert (packed - apart).abs().max() < 0.1
    assert (gradient - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(("num_ranks", "budget"), [(1, 1000), (1, 9), (2, 1000), (2, 9)])
def test_the_gradient_of_a_batch_does_not_depend_on_packing_ranks_or_micro_batches(
    tmp_path: Path, num_ranks: int, budget: int
) -> None:
    model = PolicyModel(load_causal(tiny_llama(tmp_path), torch.float32), temperature=1.0)

    def loss_and_gradient(data: LearnedRows, num_ranks: int, budget: int) -> tuple[float, Tensor, int]:
        loss, sizes = 0.0, set()
        model.zero_grad()
        for rank in range(num_ranks):
            plan = data.micro_batches(range(data.num_records), Group(rank, num_ranks), budget)
            sizes.add(len(plan))
            for micro in (data.rows.pack(found, CPU) for found in plan):
                term = likelihood_loss(model(micro)[0]).loss * micro.weight
                term.backward()
                loss += term.item()
        (size,) = sizes
        gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        return loss, torch.cat(gradients), size

    expected, expected_gradient, _ = loss_and_gradient(LearnedRows(rows(is_packed=False)), 1, 1000)
    loss, gradient, size = loss_and_gradient(LearnedRows(rows(is_packed=True)), num_ranks, budget)
    assert size == (1 if budget == 1000 else 3 if num_ranks == 1 else 2)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert (gradient - expected_gradient).norm() <= 1e-5 * expected_gradient.norm()
