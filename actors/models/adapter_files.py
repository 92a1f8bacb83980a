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


def _peft_name(name: str) -> str:
    """Of a tensor that learns: A, B or magnitude of an adapter, or a part of the head."""
    layer, is_adapter, rest = name.rpartition(".adapters.")
    part = _NAMES[rest.rpartition(".")[2]] if is_adapter else ""
    return f"base_model.model.{layer}.{part}" if is_adapter else f"base_model.model.{name}"


def write_adapter(pretrained: Any, config: LoraConfig, state: Mapping[str, Tensor], folder: Path) -> None:
    """Writes `folder`.

    Args:
        state: tensors that learn, by their names in the model, on the CPU.

    Raises:
        StorageError: it can't be written.
    """
    folder.mkdir()
    heads = sorted({name.rpartition(".")[0] for name in state if ".adapters." not in name})
    layers = sorted({name.partition(".adapters.")[0] for name in state if ".adapters." in name})
    settings = json.dumps(_settings(pretrained, config, layers, heads), indent=2)
    (folder / _CONFIG).write_text(settings, encoding="utf-8")
    named = {_peft_name(name): tensor.contiguous() for name, tensor in state.items()}
    try:
        save_file(named, folder / _WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:
        raise StorageError(f"{folder} can't be written ({error}): is the disk full?") from error


def _settings(pretrained: Any, config: LoraConfig, layers: list[str], heads: list[str]) -> Mapping[str, Any]:
    modules = dict(adapted_layers(pretrained))
    adapters = [adapter for layer in layers for adapter in modules[layer].adapters.values()]
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
        "fan_in_fan_out": all(adapter.transposed for adapter in adapters),
        "target_modules": _targets(pretrained, layers),
        "modules_to_save": heads or None,
        "inference_mode": True,
    }


def _targets(pretrained: Any, names: list[str]) -> list[str]:
    """The last parts of the layers' names, if these name no other modules; else whole names."""
    last_parts = {name.rpartition(".")[2] for name in names}
    there = [name for name, _ in pretrained.named_modules() if name.rpartition(".")[2] in last_parts]
    return sorted(last_parts if sorted(there) == sorted(names) else names)
