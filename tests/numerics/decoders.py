"""Decoders that do not do what they are told, for the proofs of a model's lines of several rows."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor


def ignore(monkeypatch: pytest.MonkeyPatch, model: Any, name: str) -> None:
    """Lets a model's decoder ignore an argument."""
    decoder = model.get_decoder()
    forward = decoder.forward
    monkeypatch.setattr(decoder, "forward", lambda **given: forward(**{**given, name: None}))


def refuse(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    """Lets a model's decoder take nothing but tokens."""

    def refusing(input_ids: Tensor, use_cache: bool) -> Any:
        pytest.fail("asked again")

    monkeypatch.setattr(model.get_decoder(), "forward", refusing)
