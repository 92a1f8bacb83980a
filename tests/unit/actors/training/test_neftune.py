"""Noise on embeddings: of the right size, where there is a gradient, and the same however a batch is cut."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from actors.learning.heads import PolicyModel
from actors.learning.packing import token_rows
from actors.models.model import load_causal
from actors.training.neftune import EmbeddingNoise
from tests.tiny import tiny_llama

CPU = torch.device("cpu")
ROWS = token_rows([[5, 6, 7], [8], [9, 10]], [[11, 12], [13, 14, 15, 16], [17]])
ALPHA = 5.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"))


def noisy(folder: Path, *, seed: int = 1, alpha: float = ALPHA) -> tuple[PolicyModel, EmbeddingNoise]:
    model = PolicyModel(load_causal(folder, torch.float32), temperature=1.0)
    return model, EmbeddingNoise(model, alpha=alpha, seed=seed)


def logprobs(model: PolicyModel, *rows: int) -> torch.Tensor:
    return model(ROWS.pack(list(rows), CPU))[0].detach()


def test_the_noise_is_that_of_the_paper(folder: Path) -> None:
    model, noise = noisy(folder)
    embedding = model.pretrained.get_input_embeddings()
    found: list[torch.Tensor] = []
    embedding.register_forward_hook(lambda module, inputs, output: found.append(output.detach()))
    noise.begin_batch([0, 1, 2])
    micro = ROWS.pack([1, 0], CPU)
    model(micro)
    added_BTD = found[0] - embedding.weight[micro.input_ids_BT].detach()
    size = added_BTD.shape[-1]
    for place in (0, 1):
        bound = ALPHA / math.sqrt(5 * size)
        assert 0.9 * bound < added_BTD[place, :5].abs().max() <= bound * 1.001
        assert abs(added_BTD[place, :5].mean()) < 0.2 * bound
    assert not torch.equal(added_BTD[0], added_BTD[1])


def test_padding_gets_none_and_shorter_rows_get_more(folder: Path) -> None:
    model, noise = noisy(folder)
    embedding = model.pretrained.get_input_embeddings()
    found: list[torch.Tensor] = []
    embedding.register_forward_hook(lambda module, inputs, output: found.append(output.detach()))
    noise.begin_batch([0, 2])
    micro = ROWS.pack([0, 2], CPU)
    model(micro)
    added_BTD = found[0] - embedding.weight[micro.input_ids_BT].detach()
    assert (added_BTD[1, 3:] == 0).all() and (added_BTD[1, :3] != 0).any()
    assert added_BTD[1].abs().max() > added_BTD[0].abs().max()


def test_it_follows_from_seed_batch_and_row_and_not_from_micro_batches(folder: Path) -> None:
    model, noise = noisy(folder)
    noise.begin_batch([0, 1, 2])
    together = logprobs(model, 0, 1, 2)
    apart = torch.cat([logprobs(model, 0), logprobs(model, 2, 1)[[1, 2, 3, 4, 0]]])
    assert torch.allclose(together, apart, atol=1e-5)
    again, other_noise = noisy(folder)
    other_noise.begin_batch([0, 1, 2])
    assert torch.equal(logprobs(again, 0, 1, 2), together)
    noise.begin_batch([2, 1, 0])
    assert not torch.allclose(logprobs(model, 0, 1, 2), together, atol=1e-3)
    other_seed, its_noise = noisy(folder, seed=2)
    its_noise.begin_batch([0, 1, 2])
    assert not torch.allclose(logprobs(other_seed, 0, 1, 2), together, atol=1e-3)


def test_rows_in_one_line_get_the_noise_of_separate_rows(folder: Path) -> None:
    packed = token_rows([[5, 6, 7], [8], [9, 10]], [[11, 12], [13, 14, 15, 16], [17]])
    packed.is_packed = True
    micro = packed.pack([0, 1, 2], CPU)
    assert micro.input_ids_BT.shape == (1, 13)
    model, noise = noisy(folder)
    noise.begin_batch([0, 1, 2])
    assert torch.allclose(model(micro)[0].detach(), logprobs(model, 0, 1, 2), atol=1e-5)


def test_without_gradient_there_is_no_noise(folder: Path) -> None:
    plain = PolicyModel(load_causal(folder, torch.float32), temperature=1.0)
    model, noise = noisy(folder)
    noise.begin_batch([0])
    with torch.no_grad():
        assert torch.equal(logprobs(model, 0, 1, 2), logprobs(plain, 0, 1, 2))
    assert not torch.equal(logprobs(model, 0, 1, 2), logprobs(plain, 0, 1, 2))
