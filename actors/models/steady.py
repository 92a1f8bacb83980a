"""Deterministic learning: a model computes the same in learning and in scoring.

With dropout, layer drop or jitter the learning policy would differ from the sampling policy. They are switched
off without using their names: all modules stay in evaluation mode. Only layers that recompute their activations are
in training mode, because transformers requires it, except while they compute.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from orchestrator.errors import DataError


class SteadyModel(nn.Module):
    """Base of models that learn. Subclasses set `pretrained`, a model of transformers."""

    pretrained: Any

    def decoder(self) -> Any:
        """The part of `pretrained` that computes hidden states."""
        raise NotImplementedError

    def learned_head(self) -> list[nn.Parameter]:
        """What learns beside adapters."""
        return []

    def train(self, mode: bool = True) -> SteadyModel:
        """Evaluation mode everywhere, except for layers that recompute their activations."""
        super().train(False)
        for module in self.modules():
            module.training = mode and _recomputes(module)
        return self

    def checkpoint_gradients(self) -> None:
        """Layers recompute their activations during the backward pass, to save memory.

        Raises:
            DataError: the model has no such layers.
        """
        try:
            self.pretrained.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        except ValueError as error:
            raise DataError(f"{self.pretrained.name_or_path}: {error} Set gradient_checkpointing=false.") from error
        layers = [module for module in self.pretrained.modules() if _recomputes(module)]
        if not layers:
            raise DataError(
                f"{self.pretrained.name_or_path} ({type(self.pretrained).__name__}) has no layers that can recompute "
                "their activations. Set gradient_checkpointing=false."
            )
        for layer in layers:
            layer._gradient_checkpointing_func = partial(_recomputed, layer, layer._gradient_checkpointing_func)


def _recomputes(module: Any) -> bool:
    return isinstance(module, GradientCheckpointingLayer) and bool(module.gradient_checkpointing)


def _recomputed(layer: nn.Module, recompute: Callable[..., Any], forward: Callable[..., Any], *inputs: Any) -> Any:
    def steady(*arguments: Any) -> Any:
        layer.training = False
        try:
            return forward(*arguments)
        finally:
            layer.training = True

    return recompute(steady, *inputs)
