"""Noise on the embeddings of what is learned (NEFTune, Jain 2023, algorithm 1), against overfitting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from actors.learning.heads import PolicyModel
from actors.learning.packing import MicroBatch
from orchestrator.prompts import derive_seed


class EmbeddingNoise:
    """Adds uniform noise in ±alpha / √(L·D) to the embeddings of a row of L tokens, D numbers each.

    Only forwards with gradient get it. The noise follows from the seed, the batch and the row, whatever the ranks and
    micro-batches, so that a resumed training adds the same.
    """

    def __init__(self, model: PolicyModel, *, alpha: float, seed: int) -> None:
        self._alpha, self._seed = alpha, seed
        self._micro: MicroBatch | None = None
        self._batch = 0
        model.register_forward_pre_hook(self._begin_forward)
        model.pretrained.get_input_embeddings().register_forward_hook(self._add)

    def begin_batch(self, records: Sequence[int]) -> None:
        self._batch = derive_seed("neftune", self._seed, *records)

    def _begin_forward(self, _model: Any, inputs: tuple[MicroBatch]) -> None:
        (self._micro,) = inputs

    def _add(self, _embedding: Any, _inputs: Any, embedded_BTD: Tensor) -> Tensor | None:
        if self._micro is None or not torch.is_grad_enabled():
            return None
        _, width, size = embedded_BTD.shape
        noise_BTD = torch.zeros(embedded_BTD.shape)
        noise_ND = noise_BTD.view(-1, size)
        last_B = self._micro.last_index_B
        position_B = self._micro.shared["position_ids"].flatten()[last_B] if self._micro.shared else last_B % width
        for row, last, position in zip(self._micro.rows, last_B.tolist(), position_B.tolist(), strict=False):
            length = position + 1
            draw = torch.Generator().manual_seed(derive_seed("row", self._batch, row))
            uniform_LD = torch.rand(length, size, generator=draw) * 2.0 - 1.0
            noise_ND[last - position : last + 1] = uniform_LD * (self._alpha / math.sqrt(length * size))
        return embedded_BTD + noise_BTD.to(embedded_BTD)
