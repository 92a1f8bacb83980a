"""The contents of a model folder, from the headers of its files: no weights are read."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from actors.models.model import LOADING_ERRORS
from orchestrator.errors import DataError

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_LFS = b"version https://git-lfs"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WINDOWS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length", "n_ctx")
_SCALED_ROPE = ("linear", "dynamic", "yarn")


@dataclass(frozen=True)
class Header:
    """One tensor of a file; dtype as safetensors names it."""

    dtype: str
    shape: tuple[int, ...]


def read_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Raises DataError if config.json is invalid, of an architecture that transformers does not know, or quantised."""
    file = folder / "config.json"
    _require_no_pointer(file)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except LOADING_ERRORS as error:
        raise DataError(
            f"{file} can't be used: {_first_line(error)} Give a model of an architecture that the installed "
            "transformers knows, or, for one that brings its own code, set model.trust_remote_code=true."
        ) from error
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        kind = quantised.get("quant_method") if isinstance(quantised, Mapping) else type(quantised).__name__
        raise DataError(
            f"{folder} holds quantised weights ({kind}): they can't be learned from, nor compared with what "
            "is learned. Give the model in bfloat16 or float32."
        )
    return config


def read_headers(folder: Path) -> dict[str, Header]:
    """Every tensor of a folder's safetensors.

    Raises:
        DataError: there are none, or a file is missing, a Git-LFS pointer, empty, truncated or damaged.
    """
    headers: dict[str, Header] = {}
    for file in _files(folder):
        if not file.is_file():
            raise DataError(f"{file} is missing, which {folder / _INDEX} names. Download the model again.")
        _require_no_pointer(file)
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  it is no mapping
                    part = tensors.get_slice(name)
                    headers[name] = Header(part.get_dtype(), tuple(part.get_shape()))
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{file} can't be read ({error}): it is cut off or damaged. Download the model again."
            ) from error
    odd = [f"{name} ({header.dtype})" for name, header in headers.items() if _is_packed(header)]
    if odd:
        raise DataError(f"{folder} holds quantised weights: {_some(odd)}. Give the model in bfloat16 or float32.")
    return headers


def _files(folder: Path) -> list[Path]:
    """The files that transformers reads."""
    if (folder / _SINGLE).exists():
        return [folder / _SINGLE]
    index = folder / _INDEX
    if index.exists():
        _require_no_pointer(index)
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            files = [folder / Path(name).name for name in sorted(set(names))]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{index} is no index of weights ({error!r}). Download the model again.") from error
        if files:
            return files
    others = sorted(file.name for end in ("*.bin", "*.pt", "*.pth", "*.gguf") for file in folder.glob(end))
    found = f" It has {_some(others)}, which is not read: pickles can run code." if others else ""
    raise DataError(
        f"{folder} holds no {_SINGLE}.{found} Save the model as safetensors: model.save_pretrained(folder) of "
        "transformers writes them."
    )


def weight_bytes(folder: Path) -> int:
    """Bytes of a model's weights on disk. Raises DataError: there are none."""
    return sum(file.stat().st_size for file in _files(folder) if file.exists())


def _require_no_pointer(file: Path) -> None:
    try:
        with file.open("rb") as stream:
            start = stream.read(len(_LFS))
    except OSError as error:
        raise DataError(
            f"{file} can't be read ({error.strerror or error}). Give a folder made by save_pretrained."
        ) from error
    if start == _LFS:
        raise DataError(f"{file} is a Git-LFS pointer and not the file itself. Run `git lfs pull` in {file.parent}.")
    if not start:
        raise DataError(f"{file} is empty. Download the model again.")


def _is_packed(header: Header) -> bool:
    return len(header.shape) > 1 and header.dtype not in _DTYPES


def require_weights(
    folder: Path, loader: Any, config: Any, headers: Mapping[str, Header], *, may_lack: str | None = None
) -> None:
    """Raises DataError if the tensors of the files are not those of the model: some are missing, of another shape,
    or of layers that its config does not count.

    transformers' own loader decides; it gets tensors without contents.

    Args:
        loader: an Auto class of transformers.
        may_lack: start of the names that may be missing.
    """
    tensors = {
        name: torch.empty(header.shape, dtype=_DTYPES.get(header.dtype, torch.float32), device="meta")
        for name, header in headers.items()
    }
    try:
        with _quiet(), torch.device("meta"):
            kind = type(loader.from_config(config))
            _, info = kind.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                device_map="meta",
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except LOADING_ERRORS as error:
        raise DataError(f"{folder} can't be loaded as {loader.__name__}: {_first_line(error)}") from error
    missing = sorted(name for name in info["missing_keys"] if not (may_lack and name.startswith(may_lack)))
    if missing:
        raise DataError(f"{folder} lacks {len(missing)} tensors of the model: {_some(missing)}. It is incomplete.")
    other = [f"{name} {tuple(found)} for {tuple(wanted)}" for name, found, wanted in sorted(info["mismatched_keys"])]
    if other:
        raise DataError(f"{folder}: tensors have other shapes than config.json says: {_some(other)}.")
    _require_no_more(folder, info["unexpected_keys"], headers)


def _require_no_more(folder: Path, unexpected: Collection[str], headers: Mapping[str, Header]) -> None:
    """Tensors that nobody asks for are left alone, unless others of their kind are used: then layers are left out."""
    used = {_kind(name) for name in headers if name not in unexpected}
    extra = sorted(name for name in unexpected if _kind(name) in used and _kind(name) != name)
    if extra:
        raise DataError(
            f"{folder} holds {len(extra)} tensors of layers or experts that config.json does not count: "
            f"{_some(extra)}. Correct the numbers in config.json."
        )


def _kind(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def window(config: Any) -> int | None:
    """The number of positions that a model supports according to its config; None if the config does not say."""
    text = config.get_text_config()
    found = next((value for name in _WINDOWS if isinstance(value := getattr(text, name, None), int)), None)
    rope = getattr(text, "rope_parameters", None)
    if found is None or not isinstance(rope, Mapping) or rope.get("rope_type") not in _SCALED_ROPE:
        return found
    start = rope.get("original_max_position_embeddings") or found
    return max(found, int(start * (rope.get("factor") or 1.0)))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers' report about missing tensors: they are reported here."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _first_line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if text.endswith((".", "!")) else f"{text}."


def _some(names: Collection[str]) -> str:
    return ", ".join(list(names)[:5]) + (", ..." if len(names) > 5 else "")
