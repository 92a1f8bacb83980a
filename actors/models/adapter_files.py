"""Writes adapters in the format of peft, whose PeftModel.from_pretrained reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from actors.models.adapters import adapted_layers
from orchestrator.config.sections import LoraConfig
from orchestrator.errors import StorageError

FOLDER = "adapter"
_NAMES = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapter_names(pretrained: Any) -> Mapping[str, str]:
    """peft's name of each tensor that learns, by its name in the model."""
    found = {
        f"{name}.adapter.{part}": f"base_model.model.{name}.{_NAMES[part]}"
        for name, module in adapted_layers(pretrained)
        for part, _ in module.adapter.named_parameters()
    }
    heads = [name for name, parameter in pretrained.named_parameters() if parameter.requires_grad and name not in found]
    return found | {name: f"base_model.model.{name}" for name in heads}


def write_adapter(pretrained: Any, config: LoraConfig, state: Mapping[str, Tensor], folder: Path) -> None:
    """Writes `folder`.

    Args:
        state: tensors that learn, by their names in the model, on the CPU.

    Raises:
        StorageError: it can't be written.
    """
    folder.mkdir()
    settings = json.dumps(_settings(pretrained, config), indent=2)
    (folder / _CONFIG).write_text(settings, encoding="utf-8")
    named = {theirs: state[ours].contiguous() for ours, theirs in adapter_names(pretrained).items()}
    try:
        save_file(named, folder / _WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:
        raise StorageError(f"{folder} can't be written ({error}): is the disk full?") from error


def _settings(pretrained: Any, config: LoraConfig) -> Mapping[str, Any]:
    layers = dict(adapted_layers(pretrained))
    adapters = [name for name, _ in pretrained.named_parameters() if ".adapter." in name]
    heads = {name.rpartition(".")[0] for name in adapter_names(pretrained) if name not in adapters}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if pretrained.can_generate() else "SEQ_CLS",
        "base_model_name_or_path": pretrained.name_or_path,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "use_rslora": config.rank_stabilised,
        "use_dora": config.dora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": all(module.adapter.transposed for module in layers.values()),
        "target_modules": _targets(pretrained, list(layers)),
        "modules_to_save": sorted(heads) or None,
        "inference_mode": True,
    }


def _targets(pretrained: Any, names: list[str]) -> list[str]:
    """The last parts of the layers' names, if these name no other modules; else whole names."""
    last_parts = {name.rpartition(".")[2] for name in names}
    there = [name for name, _ in pretrained.named_modules() if name.rpartition(".")[2] in last_parts]
    return sorted(last_parts if sorted(there) == sorted(names) else names)
