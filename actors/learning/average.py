"""An exponential moving average of a model's weights over the steps of a run (Polyak 1992; Ramé 2024, WARP)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from orchestrator.errors import StorageError
from orchestrator.run.storage import reading, writing

FILE = "average.safetensors"


class WeightAverage:
    """On the CPU, in fp32. Begins with the first weights that are added.

    Args:
        decay: share of the average that a step keeps.
        holds: whether this rank holds it. The others only take part in gathering the weights.
    """

    def __init__(self, decay: float, *, holds: bool) -> None:
        self._decay, self.holds = decay, holds
        self.has_begun = False
        self.weights: dict[str, Tensor] = {}

    def add(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Adds the weights after a step: (name, fp32 copy of the full tensor; on other ranks
        anything)."""
        for name, tensor in weights:
            if not self.holds:
                continue
            mine = self.weights.get(name)
            if mine is None or not tensor.is_floating_point():
                self.weights[name] = tensor
            else:
                mine.lerp_(tensor, 1.0 - self._decay)
        self.has_begun = True

    def save(self, folder: Path) -> None:
        """Raises StorageError."""
        if self.holds and self.has_begun:
            with writing(folder / FILE):
                try:
                    save_file(self.weights, folder / FILE)
                except SafetensorError as error:
                    raise StorageError(f"{folder / FILE} can't be written ({error}): is the disk full?") from error

    def load(self, folder: Path) -> None:
        """Raises StorageError: the file is damaged. A checkpoint from before the first step has none."""
        self.has_begun = (folder / FILE).exists()
        self.weights = {}
        if self.holds and self.has_begun:
            with reading(folder / FILE):
                try:
                    self.weights = load_file(folder / FILE)
                except SafetensorError as error:
                    raise StorageError(f"{folder / FILE} is damaged ({error}).") from error

    def state(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The average in the model's type."""
        return {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in self.weights.items()
        }
