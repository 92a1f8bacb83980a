"""Writes a learned model as a Hugging Face folder: completely or not at all, and reads it back to verify it."""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from actors.learning.heads import PolicyModel, ValueModel, probed
from actors.models.adapters import adapted_layers, frozen_weights
from actors.models.model import load_causal, load_scorer
from actors.text.tokenizing import load_tokenizer
from orchestrator.errors import DataError, StorageError
from orchestrator.run.storage import follow_umask, sync_tree, writing

GENERATION_CONFIG = "generation_config.json"
# The learner's device may differ from the one that reads an export back.
_TOLERANCES = {torch.float32: 1e-2, torch.bfloat16: 0.5}


def named_state(pretrained: Any, *, values: bool = True) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of everything that a model's file holds: parameters without adapters', tied ones once, then
    quantised weights, dequantised one by one (not `values`: without values), then buffers that are saved."""
    adapters = {id(tensor) for _, layer in adapted_layers(pretrained) for tensor in layer.adapters.parameters()}
    yield from ((name, tensor) for name, tensor in pretrained.named_parameters() if id(tensor) not in adapters)
    yield from ((name, weight.tensor() if values else weight.spec()) for name, weight in frozen_weights(pretrained))
    unsaved = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in pretrained.named_modules()
        for name in module._non_persistent_buffers_set
    }
    yield from ((name, buffer) for name, buffer in pretrained.named_buffers() if name not in unsaved)


def export_model(
    model: PolicyModel | ValueModel,
    state: Mapping[str, Tensor],
    folder: Path,
    tokenizer: Any,
    expected: Tensor | None,
    beside: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Writes `folder`; replaces an existing one.

    Args:
        state: of named_state, on the CPU; merged with the adapters, if the model has any.
        expected: the model's output on a few tokens, see heads.probed. None: unknown, only the tensors are compared.
        beside: writes more into the folder.

    Raises:
        StorageError: it can't be written, or reading it back gives a different model. `folder` is then unchanged.
    """
    with replacing_folder(folder) as unfinished:
        write_files(model.pretrained, state, unfinished, tokenizer)
        beside(unfinished)
        _require_same(model, state, unfinished, tokenizer, expected)


def write_files(pretrained: Any, state: Mapping[str, Tensor], folder: Path, tokenizer: Any) -> None:
    """Writes weights, config and tokenizer, and copies generation config and code from the model's original folder.
    transformers refuses to write some generation configs that it reads."""
    config = pretrained.config
    config.architectures = [type(pretrained).__name__]
    config.dtype = str(pretrained.dtype).removeprefix("torch.")
    config.to_json_file(folder / "config.json", use_diff=True)
    saved = {name: tensor for name, tensor in state.items() if name not in (pretrained._keys_to_ignore_on_save or ())}
    files = {name: _of_its_own(tensor) for name, tensor in revert_weight_conversion(pretrained, saved).items()}
    try:
        save_torch_state_dict(files, folder, max_shard_size="50GB")
    except SafetensorError as error:
        raise StorageError(f"{folder} can't be written ({error}): is the disk full?") from error
    source = Path(pretrained.name_or_path)
    kept = [source / GENERATION_CONFIG] if pretrained.can_generate() else []
    if pretrained.is_remote_code():
        kept += source.glob("*.py")
    for file in kept:
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    tokenizer.save_pretrained(folder)


def _of_its_own(tensor: Tensor) -> Tensor:
    """Copies views, such as one expert of all experts' weights, because safetensors can't write them."""
    is_whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if is_whole else tensor.clone(memory_format=torch.contiguous_format)


def _require_same(
    model: PolicyModel | ValueModel, state: Mapping[str, Tensor], folder: Path, tokenizer: Any, expected: Tensor | None
) -> None:
    dtype, remote = model.pretrained.dtype, model.pretrained.is_remote_code()
    load = load_causal if isinstance(model, PolicyModel) else load_scorer
    try:
        again = load(folder, dtype, trust_remote_code=remote)
        read = again.state_dict()
        changed = [name for name, tensor in state.items() if name not in read or not torch.equal(read[name], tensor)]
        if changed:
            raise DataError(f"{len(changed)} tensors differ from the written ones: {', '.join(changed[:5])}")
        if expected is not None:
            _require_same_output(probed(model.around(again)), expected.cpu(), _TOLERANCES.get(dtype, 0.5))
        _require_same_tokenizer(load_tokenizer(folder, trust_remote_code=remote), tokenizer)
    except DataError as error:
        raise StorageError(
            f"the export of {model.pretrained.name_or_path} can't be read back as it was learned: {error} Nothing was "
            "exported; the last checkpoint holds what was learned."
        ) from error


def _require_same_output(found: Tensor, expected: Tensor, tolerance: float) -> None:
    difference = (found - expected).abs().max().item()
    if not difference <= tolerance * max(1.0, expected.abs().max().item()):
        raise DataError(f"it computes otherwise than what was learned, by {difference:.3g}")


def _require_same_tokenizer(found: Any, tokenizer: Any) -> None:
    for what, one, other in (
        ("vocabulary", found.get_vocab(), tokenizer.get_vocab()),
        ("chat template", found.chat_template, tokenizer.chat_template),
        ("end of text", found.eos_token_id, tokenizer.eos_token_id),
    ):
        if one != other:
            raise DataError(f"its tokenizer has another {what}.")


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder next to `folder`; on a clean exit it is synced and replaces `folder`.

    Raises:
        StorageError: it can't be written.
    """
    unfinished, replaced = (folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.{end}") for end in ("tmp", "old"))
    try:
        with writing(folder):
            unfinished.mkdir(parents=True)
            yield unfinished
            follow_umask(unfinished)
            sync_tree(unfinished)
            if folder.exists():
                folder.rename(replaced)
            unfinished.rename(folder)
    finally:
        for leftover in (unfinished, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
