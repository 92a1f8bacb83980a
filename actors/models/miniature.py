"""A small random model of a folder's architecture. It serves to prove, without the weights, everything that loading
proves: log-probs and gradients, deterministic learning, export and reading back."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from actors.learning.heads import PolicyModel, ValueModel, probed
from actors.models.adapters import adapt, adapters_of
from actors.models.classifiers import as_scorer
from actors.models.export import export_model, named_state
from actors.models.model import LOADING_ERRORS, require_score_head
from actors.models.proofs import prove_loading, require_gradient, require_steady
from orchestrator.config.sections import LoraConfig
from orchestrator.errors import DataError, StorageError

VOCABULARY = 512
_LAYERS, _EXPERTS = 4, 16
_ADAPTERS = "default"
_MAX_PARAMETERS = 20_000_000
_DIMENSION = re.compile(
    r"(^|_)(size|dim|rank|width|embd|inner|model|ffn|ff|ssm|d_head)$|^(hidden|intermediate)_|_dim_|^lru_"
)
_NO_DIMENSION = re.compile(r"vocab|position|window|chunk|seq|conv|kernel|block_size|patch|image|num_|act|dropout|group")
_SPECIAL = re.compile(r"^(pad|bos|eos|sep|decoder_start)_token_id$")


def prove_small(
    folder: Path,
    config: Any,
    tokenizer: Any,
    *,
    scores: bool,
    checkpointing: bool,
    exports: bool,
    lora: LoraConfig = LoraConfig(),  # noqa: B008  frozen
) -> bool:
    """Proves on a small model what this program relies on; False if none can be made of this architecture.

    Args:
        tokenizer: part of the export.
        scores: a sequence classifier, otherwise a causal LM.
        checkpointing: layers recompute their activations.
        exports: whether the learned model is exported.
        lora: the adapters that it gets; then they learn, and are merged into the export.

    Raises:
        DataError: a proof fails.
        ConfigError: lora.targets names a layer that the model does not have.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pretrained = _small(config, scores=scores)
    if pretrained is None:
        return False
    # What is refused is named as the folder, and an export takes what is not learned from there.
    pretrained.name_or_path = str(folder)
    pretrained.config._name_or_path = str(folder)
    with suppress(*LOADING_ERRORS):  # a class that can't be loaded from memory is proved when it is loaded from files
        prove_loading(pretrained, folder)
    if scores:
        require_score_head(pretrained, folder)
    model = ValueModel(pretrained) if scores else PolicyModel(pretrained, temperature=0.7)
    if lora.dora:  # its gradient is no slope: lengths of rows count as constants
        require_gradient(model.train(), partial(probed, model))
    if lora.rank:
        adapt(model, lora, name=_ADAPTERS, seed=0, forward=partial(probed, model))
        _stir_adapters(pretrained)
    if checkpointing:
        model.checkpoint_gradients()
    require_steady(model, partial(probed, model))
    if not lora.dora:
        require_gradient(model.train(), partial(probed, model))
    if exports:
        _prove_export(model.eval(), tokenizer, folder)
    return True


def _prove_export(model: PolicyModel | ValueModel, tokenizer: Any, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        adapters = adapters_of(model.pretrained, _ADAPTERS)
        state = {
            name: adapters[name].merged(tensor) if name in adapters else tensor.detach()
            for name, tensor in named_state(model.pretrained)
        }
        try:
            export_model(model, state, Path(place) / "export", tokenizer, probed(model))
        except StorageError as error:
            raise DataError(f"{folder} could not be exported after learning: {error}") from error


def _small(config: Any, *, scores: bool) -> Any:
    """A random model with few layers, narrow ones if possible; None if none can be built and run."""
    loader: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    for divisor in (32, 16, 8, 4, 2, 1):
        try:
            small = _smaller(config, divisor)
            if scores:
                as_scorer(small)
            with torch.device("meta"):
                num_params = sum(p.numel() for p in loader.from_config(small, dtype=torch.float32).parameters())
            if num_params > _MAX_PARAMETERS:
                continue
            model = loader.from_config(small, dtype=torch.float32).eval()
            _stir(model)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False).logits
        except LOADING_ERRORS:
            continue
        if torch.isfinite(logits).all():
            return model
    return None


def _stir(model: Any) -> None:
    """Adds noise to every tensor: a bias of zero would hide that it is left out."""
    generator = torch.Generator().manual_seed(0)
    tensor: Tensor
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.02 * torch.randn(tensor.shape, generator=generator))
    model.tie_weights()


def _stir_adapters(pretrained: Any) -> None:
    """New ones change nothing, so they would prove nothing."""
    generator = torch.Generator().manual_seed(0)
    for adapter in adapters_of(pretrained, _ADAPTERS).values():
        adapter.B.data.add_(0.02 * torch.randn(adapter.B.shape, generator=generator))


def _smaller(config: Any, divisor: int) -> Any:
    values = config.to_dict()
    num_layers = config.get_text_config().num_hidden_layers
    kept = _num_kept(values, num_layers)
    changed = {name: _reduced(name, value, divisor, num_layers, kept) for name, value in values.items()}
    small = type(config).from_dict({**values, **changed, "vocab_size": VOCABULARY})
    small.vocab_size = VOCABULARY  # where its name is another one
    return small


def _num_kept(values: Mapping[str, Any], num_layers: int) -> int:
    """The smallest number of layers that includes every kind in the config's lists of layer kinds."""
    kept = min(num_layers, _LAYERS)
    for value in values.values():
        if isinstance(value, list) and len(value) == num_layers and all(isinstance(item, str) for item in value):
            kept = max(kept, *(value.index(kind) + 1 for kind in set(value)))
    return kept


def _reduced(name: str, value: Any, divisor: int, num_layers: int, kept: int) -> Any:
    if isinstance(value, dict):
        return {key: _cut(item, divisor) for key, item in value.items()}  # factors of long positions, say
    if isinstance(value, list):
        return value[:kept] if len(value) == num_layers else value
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if _SPECIAL.match(name):
        return min(value, 3)
    if name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") and value == num_layers:
        return kept
    if name.endswith("experts") and value > _EXPERTS:
        return _EXPERTS
    is_dimension = _DIMENSION.search(name) and not _NO_DIMENSION.search(name)
    return value // divisor if is_dimension and value >= 4 * divisor and value % divisor == 0 else value


def _cut(item: Any, divisor: int) -> Any:
    is_factors = isinstance(item, list) and len(item) >= 8 and all(isinstance(number, (int, float)) for number in item)
    return item[: len(item) // divisor] if is_factors else item
