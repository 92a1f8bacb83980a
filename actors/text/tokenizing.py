"""Runs tokenizers of models within limits: their patterns are untrusted and may search forever."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from transformers import AutoTokenizer

from orchestrator.errors import DataError

Tokens = npt.NDArray[np.int32]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_LOAD_S = 120.0
_ENCODE_S = 60.0
_SLOWEST = 10_000  # characters per second; real tokenizers do a hundred times that

Result = TypeVar("Result")


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Raises DataError if the folder has no tokenizer that transformers can load and use."""

    def load() -> Any:
        # Mistral's own tokenizer, which a tekken.json requires, has no chat template and accepts no rendered text.
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, mistral_format=False)
        tokenizer("A short test.", add_special_tokens=False)
        return tokenizer

    return _within(load, _LOAD_S, f"{folder} holds no usable tokenizer", "Save one there with save_pretrained.")


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder holds files of a tokenizer."""
    return any((folder / name).exists() for name in _TOKENIZER_FILES)


def encode(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of each text, without added tokens: a chat template writes BOS itself.

    Raises:
        DataError: the tokenizer fails on a text, or takes too long.
    """

    if not texts:
        return []

    def run() -> list[list[int]]:
        ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    limit_s = _ENCODE_S + sum(map(len, texts)) / _SLOWEST
    return _within(
        run,
        limit_s,
        f"the tokenizer of {tokenizer.name_or_path} can't tokenise a text",
        "Correct the patterns in its tokenizer.json, or use another model.",
    )


def _within(work: Callable[[], Result], limit_s: float, what: str, way_out: str) -> Result:
    """The result of external code, run in a thread. A search that never ends is abandoned; it releases Python's
    lock."""
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001  a panic of the tokenizers library is no Exception
            errors.append(error)

    thread = Thread(target=run, name="tokenizer", daemon=True)
    thread.start()
    thread.join(limit_s)
    if results:
        return results[0]
    if not errors:
        raise DataError(f"{what}: it does not end within {limit_s:.0f} s. {way_out}")
    reason = str(errors[0]).strip() or type(errors[0]).__name__
    raise DataError(f"{what}: {type(errors[0]).__name__}: {reason}. {way_out}") from errors[0]
