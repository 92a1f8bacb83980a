"""The size of a model, from its config: no weights are read, no memory is allocated."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from actors.models.depth import shallow
from actors.models.model import LOADING_ERRORS
from orchestrator.errors import DataError
from orchestrator.planning.memory import ModelSize
from orchestrator.planning.widths import Divided

_INNER = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")


def num_embeddings(folder: Path, *, trust_remote_code: bool = False) -> int:
    """The number of token ids for which the model in a folder has embeddings. Raises DataError as model_size does."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        return int(config.get_text_config().vocab_size)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{folder}/config.json names no vocab_size of an architecture known here: {error}.") from error


def divided_sizes(folder: Path, *, trust_remote_code: bool = False) -> Divided:
    """What tensor parallelism divides. Raises DataError as model_size does."""
    try:
        text = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).get_text_config()
        inner = [(name, size) for name in _INNER if isinstance(size := getattr(text, name, None), int)]
        return Divided(text.num_attention_heads, _kv_heads(text), tuple(inner), text.vocab_size)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{folder}/config.json names no sizes of an architecture known here: {error}.") from error


def _kv_heads(text: Any) -> int | None:
    """As vLLM finds their number (transformers_utils/model_arch_config_convertor.py); None with MLA."""
    if getattr(text, "kv_lora_rank", None):
        return None
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        return 1
    names = ("num_kv_heads", "num_key_value_heads")
    return next((count for name in names if (count := getattr(text, name, None))), int(text.num_attention_heads))


def model_size(folder: Path, *, layers: int | None = None, trust_remote_code: bool = False) -> ModelSize:
    """The size of the whole model, or of its first `layers` layers.

    Raises:
        DataError: the architecture of the folder's config is unknown.
        ConfigError: the model has fewer layers.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        config = shallow(config, layers, folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except LOADING_ERRORS as error:
        raise DataError(f"{folder}/config.json is of no architecture known here: {error}.") from error
    text = config.get_text_config()
    return ModelSize(
        num_params=sum(parameter.numel() for parameter in model.parameters()),
        num_layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        feed_forward=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocabulary=text.vocab_size,
        linear=_linear(model.get_decoder()),
        stored=str(config.dtype).removeprefix("torch.") if config.dtype else None,
    )


def _linear(decoder: Any) -> tuple[tuple[str, int, int, int], ...]:
    """The layers with a matrix `weight` that are no embeddings: about those that adapters would find by their outputs,
    see actors/models/adapters.py. Transposed ones count with inputs and outputs exchanged, which adds up equally
    without DoRA."""
    counts = Counter(
        (name.rpartition(".")[2], *reversed(module.weight.shape))
        for name, module in decoder.named_modules()
        if isinstance(getattr(module, "weight", None), torch.Tensor)
        and module.weight.ndim == 2
        and not isinstance(module, torch.nn.Embedding)
    )
    return tuple((name, count, inputs, outputs) for (name, inputs, outputs), count in counts.items())
