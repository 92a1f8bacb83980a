"""Converts the tensors of a loaded transformers model to those of its checkpoint, which vLLM loads.

For most models both are the same. Others are loaded through conversions that rename tensors or join them (the experts
of a layer in one tensor); transformers can revert these, here one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion

from actors.models.export import named_state
from actors.weights.manifest import listed
from orchestrator.errors import PublishError

NamedTensor = tuple[str, torch.Tensor]


class CheckpointForm:
    """Converts the tensors of one architecture.

    Args:
        model: a transformers model, without weights (on the meta device).

    Raises:
        PublishError: a tensor of the checkpoint is composed of several tensors of the model.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.specs = [(name, tuple(tensor.shape)) for name, tensor in named_state(model)]
        self.buffers = frozenset(name for name, _ in self.specs) - {name for name, _ in model.named_parameters()}
        whole = {name: torch.empty(shape, device="meta") for name, shape in self.specs}
        converted = revert_weight_conversion(model, dict(whole))
        self.is_same = {name: tuple(t.shape) for name, t in converted.items()} == dict(self.specs)
        if self.is_same:
            return
        parts = {name: tensor.shape for name, tensor in self.convert(whole.items())}
        differ = sorted(name for name, tensor in converted.items() if parts.get(name) != tensor.shape)
        if differ:
            raise PublishError(
                f"{type(model).__name__}: {listed(differ)} of its checkpoint can't be made of single tensors of the "
                "trainer, so vLLM can't be given its weights; set rollout.engine=hf."
            )

    def convert(self, tensors: Iterable[NamedTensor]) -> Iterator[NamedTensor]:
        """Yields the checkpoint's tensors for each of the model's."""
        for pair in tensors:
            if self.is_same:
                yield pair
            else:
                yield from revert_weight_conversion(self._model, dict([pair])).items()
