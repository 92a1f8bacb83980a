"""A reader of layers on a device makes nothing on the host that meets them; the meta device takes the GPU's place."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from actors.weights.readback import Reader

META = torch.device("meta")


class Logits(nn.Module):
    scale, soft_cap = 1, None

    def forward(self, head: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = head(hidden)
        return found


class Model(nn.Module):
    """What a reader asks of a model of vLLM: the layers, and `compute_logits` through the processor."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(6, 4, device=device), nn.Linear(4, 6, bias=False, device=device)
        self.logits_processor = Logits()
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=4))
        self.asked: list[torch.Tensor] = []

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        self.asked.append(hidden)
        found: torch.Tensor = self.logits_processor(self.head, hidden)
        return found


def test_layers_without_packed_copies_are_read_as_bytes_and_nothing_is_computed() -> None:
    model = Model(META)
    reader = Reader(model)
    assert not model.asked
    assert reader.ways("head", "weight") == reader.ways("embed", "weight") == ("bytes",)
    assert reader.read("head", "weight", "bytes").device == META


@pytest.mark.parametrize("device", [META, torch.device("cpu")], ids=str)
def test_the_head_is_found_on_the_device_of_the_parameters(device: torch.device) -> None:
    model = Model(device)
    layer: Any = model.head
    layer.cpu_linear = None
    assert Reader(model)._head is model.head
    assert [(hidden.device, tuple(hidden.shape)) for hidden in model.asked] == [(device, (1, 4))]
