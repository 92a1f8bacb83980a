"""The tiny models of other tests load as written, and their outputs vary."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.families import FAMILIES, tiny_folder, tiny_model

TOKENS = torch.arange(20, 60)[None]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tiny_model_is_read_back_from_its_folder(name: str, tmp_path: Path) -> None:
    folder = tiny_folder(name, tmp_path)
    read = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logprobs = tiny_model(name)(TOKENS).logits.log_softmax(-1)
        assert torch.equal(read(TOKENS).logits.log_softmax(-1), logprobs)
    assert logprobs.std() > 0.1, "log-probs that hardly differ would hide a wrong model"


def test_there_are_thirty_architectures() -> None:
    assert len({model_type for model_type, _ in FAMILIES.values()}) >= 30
