"""The first layers of a model as a separate model: a shortened config with the same weights."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

from orchestrator.errors import ConfigError

_KEY = "reward_model.layers"


def shallow(config: Any, layers: int | None, folder: Path) -> Any:
    """A copy of a transformers config with its first `layers` layers; the config itself for None.

    Raises:
        ConfigError: the model has fewer layers, or gives their number in a part of its config.
    """
    if layers is None:
        return config
    whole = getattr(config, "num_hidden_layers", None)
    if config.get_text_config() is not config or not isinstance(whole, int):
        raise ConfigError(
            f"{_KEY}={layers}: the layers of {folder} can't be cut (model_type {config.model_type}); set it to null."
        )
    if layers > whole:
        raise ConfigError(f"{_KEY}={layers}, but {folder} has {whole} layers: set {whole} or less, or null.")
    cut = deepcopy(config)
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == whole:  # one entry per layer
            setattr(cut, name, value[:layers])
    cut.num_hidden_layers = layers
    return cut
