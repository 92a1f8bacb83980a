"""Learners on a GPU: memory that a rest gives back, equal bits, packed rows, the optimizer on the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from actors.learning import distributed
from actors.learning.heads import PolicyModel, ValueModel
from actors.learning.learner import Learner
from actors.learning.objectives.losses import likelihood_loss
from actors.learning.packing import TokenRows
from actors.models.model import load_causal
from orchestrator.config.sections import LearnerConfig
from tests.numerics.ranks import group
from tests.numerics.samples import experience
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"))


def made(folder: Path, **settings: Any) -> Learner:
    distributed.join(group())
    model: PolicyModel | ValueModel = PolicyModel(load_causal(folder, torch.bfloat16), temperature=1.0)
    config = LearnerConfig(**{"learning_rate": 1e-3, "gpus_per_rank": 1, **settings})
    return Learner(model, config, dtype="bfloat16", total_optimizer_steps=8)


def learned(
    learner: Learner, steps: int = 3, *, is_packed: bool = False, rests: bool = False
) -> dict[str, torch.Tensor]:
    for step in range(steps):
        if rests:
            learner.rest()
            learner.resume()
        rows = TokenRows.of_table(experience(seed=step))
        rows.is_packed = is_packed
        micros = [rows.pack([0, 1, 2, 3], learner.device), rows.pack([4, 5, 6, 7], learner.device)]
        count = float(rows.response_lengths.sum())
        learner.update(micros, lambda output, _: likelihood_loss(output[0]), count=count, what="test")
    return dict(learner.full_weights(torch.float32))


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return float(torch.cat([(one[name] - other[name]).flatten() for name in one]).norm())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_rest_empties_the_device_and_changes_no_bit(folder: Path, stage: int) -> None:
    straight = learned(made(folder, zero_stage=stage))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    learner = made(folder, zero_stage=stage)
    rested = learned(learner, rests=True)
    assert all(torch.equal(straight[name], rested[name]) for name in straight)
    awake = torch.cuda.memory_reserved() - before
    learner.rest()
    assert torch.cuda.memory_reserved() - before < 0.2 * awake
    learner.resume()


def test_two_learners_compute_the_same_bits(folder: Path) -> None:
    one, other = (learned(made(folder)) for _ in range(2))
    assert torch.are_deterministic_algorithms_enabled()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("settings", [{"is_packed": True}, {"offload_optimizer": True}])
def test_packed_rows_and_an_optimizer_on_the_host_learn_the_same(folder: Path, settings: dict[str, bool]) -> None:
    start = dict(made(folder).full_weights(torch.float32))
    plain = learned(made(folder))
    offloads = settings.get("offload_optimizer", False)
    found = learned(made(folder, offload_optimizer=offloads), is_packed=settings.get("is_packed", False))
    assert distance(found, plain) < 0.2 * distance(plain, start)


def test_ligers_kernels_learn_the_same(folder: Path) -> None:
    pytest.importorskip("liger_kernel")
    start = dict(made(folder).full_weights(torch.float32))
    plain, found = learned(made(folder)), learned(made(folder, liger=True))
    assert distance(found, plain) < 0.2 * distance(plain, start)
