"""Liger's kernels, which need a GPU: refused with the way out where they can't be."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from transformers.integrations import liger as integration

from actors.learning import distributed
from actors.learning.heads import PolicyModel, probed
from actors.learning.learner import Learner
from actors.models import liger
from actors.models.model import load_causal
from orchestrator.config.sections import LearnerConfig
from orchestrator.errors import ConfigError, DataError
from tests.numerics.ranks import group
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"))


def policy(folder: Path) -> PolicyModel:
    return PolicyModel(load_causal(folder, torch.float32), temperature=1.0)


def test_a_missing_package_is_refused_with_the_way_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger, "is_liger_kernel_available", lambda: False)
    distributed.join(group())
    with pytest.raises(ConfigError, match=r"pip install 'rlhf-orchestrator\[liger\]', or set liger=false"):
        Learner(policy(folder), LearnerConfig(liger=True), dtype="float32", total_optimizer_steps=1)


def test_a_cpu_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger, "is_liger_kernel_available", lambda: True)
    model = policy(folder)
    with pytest.raises(ConfigError, match="needs a GPU, and the model is on cpu"):
        liger.use_liger(model.pretrained, partial(probed, model))


def patched(pretrained: Any, _options: Any, *, scale: float) -> None:
    """As the package does: a class of transformers' module, and a method of each norm."""
    module = sys.modules[type(pretrained).__module__]
    module.LlamaRMSNorm = None

    def forward(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        return scale * type(self).forward(self, hidden)

    forward.__module__ = "liger_kernel.transformers.rms_norm"
    for layer in pretrained.modules():
        if type(layer).__name__ == "LlamaRMSNorm":
            layer.forward = MethodType(forward, layer)


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_only_this_model_changes_and_it_must_compute_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    monkeypatch.setattr(liger, "is_liger_kernel_available", lambda: True)
    monkeypatch.setattr(liger, "_DEVICE", "cpu")
    monkeypatch.setattr(integration, "apply_liger_kernel", partial(patched, scale=scale))
    model = policy(folder)
    module = sys.modules[type(model.pretrained).__module__]
    own = module.LlamaRMSNorm
    if scale == 1.0:
        liger.use_liger(model.pretrained, partial(probed, model))
    else:
        with pytest.raises(DataError, match="computes otherwise with Liger's kernels"):
            liger.use_liger(model.pretrained, partial(probed, model))
    assert module.LlamaRMSNorm is own is not None


def test_a_model_without_kernels_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger, "is_liger_kernel_available", lambda: True)
    monkeypatch.setattr(liger, "_DEVICE", "cpu")
    monkeypatch.setattr(integration, "apply_liger_kernel", lambda *_: None)
    model = policy(folder)
    with pytest.raises(ConfigError, match="Liger has no kernels for LlamaForCausalLM"):
        liger.use_liger(model.pretrained, partial(probed, model))
