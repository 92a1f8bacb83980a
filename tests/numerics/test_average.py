"""The moving average of the policy: by hand, after a reload, over ranks, and as what is exported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.learning import zero
from actors.learning.average import FILE, WeightAverage
from actors.learning.distributed import Group
from actors.learning.objectives.objective import LearnJob
from actors.models.model import load_causal
from actors.roles.policy import PolicyWorker
from orchestrator.algorithms.ppo import Ppo
from orchestrator.config.base import Dtype
from orchestrator.config.sections import PolicyConfig
from orchestrator.errors import StorageError
from tests.numerics.ranks import context, group, run_ranks
from tests.numerics.samples import experience
from tests.tiny import tiny_llama

DECAY = 0.75


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"))


def policy(
    folder: Path, mine: Group, *, dtype: Dtype = "float32", decay: float = DECAY, stage: int = 1
) -> PolicyWorker:
    section = PolicyConfig(learning_rate=1e-2, ema_decay=decay, zero_stage=stage)
    return PolicyWorker(section, context(folder, Ppo(minibatches=2), dtype=dtype, total_optimizer_steps=8), mine)


def weights(worker: PolicyWorker) -> dict[str, Tensor]:
    return dict(worker.full_weights(torch.float32))


def learn(worker: PolicyWorker, step: int) -> dict[str, Tensor]:
    worker.learn([experience(seed=step)], LearnJob(step, 0.0, 1.0, 0.0, seed=1))
    return weights(worker)


def exported(folder: Path, dtype: torch.dtype) -> Mapping[str, Tensor]:
    return dict(load_causal(folder, dtype).named_parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_export_is_the_average_over_the_steps(folder: Path, tmp_path: Path, dtype: Dtype) -> None:
    worker = policy(folder, group(), dtype=dtype)
    expected = weights(worker)
    for step in range(3):
        last = learn(worker, step)
        expected = {name: DECAY * expected[name] + (1 - DECAY) * last[name] for name in last}
    worker.export(tmp_path / "export")
    found = exported(tmp_path / "export", getattr(torch, dtype))
    for name, tensor in found.items():
        assert torch.allclose(tensor.float(), expected[name], rtol=8e-3 if dtype == "bfloat16" else 1e-5, atol=1e-6)
    moved = (found["model.layers.0.mlp.up_proj.weight"].float() - last["model.layers.0.mlp.up_proj.weight"]).abs().max()
    assert moved > 1e-3, "the last weights are others"
    assert all(torch.equal(tensor, last[name]) for name, tensor in weights(worker).items()), "it learns on"


def test_a_reload_goes_on_with_the_same_average(folder: Path, tmp_path: Path) -> None:
    straight = policy(folder, group())
    learn(straight, 0)
    (tmp_path / "saved").mkdir()
    straight.save(tmp_path / "saved")
    learn(straight, 1)
    straight.export(tmp_path / "straight")
    resumed = policy(folder, group())
    resumed.load(tmp_path / "saved")
    learn(resumed, 1)
    resumed.export(tmp_path / "resumed")
    one, other = (exported(tmp_path / name, torch.float32) for name in ("straight", "resumed"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_checkpoint_from_before_the_first_step_begins_there(folder: Path, tmp_path: Path) -> None:
    worker = policy(folder, group())
    worker.save(tmp_path)
    assert not (tmp_path / FILE).exists()
    worker.load(tmp_path)
    start = weights(worker)
    last = learn(worker, 0)
    worker.export(tmp_path / "export")
    for name, tensor in exported(tmp_path / "export", torch.float32).items():
        assert torch.allclose(tensor, DECAY * start[name] + (1 - DECAY) * last[name], atol=1e-6)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"\0" * 20)
    with pytest.raises(StorageError, match=FILE):
        WeightAverage(0.5, holds=True).load(tmp_path)


def test_without_a_decay_nothing_is_averaged(folder: Path, tmp_path: Path) -> None:
    worker = policy(folder, group(), decay=0.0)
    last = learn(worker, 0)
    worker.save(tmp_path)
    worker.export(tmp_path / "export")
    assert not (tmp_path / FILE).exists()
    assert all(torch.equal(tensor, last[name]) for name, tensor in exported(tmp_path / "export", torch.float32).items())


def on_two_ranks(mine: Group, folder: Path, place: Path) -> Any:
    zero.PERSISTENT_ELEMENTS = 0  # parameters really lie in parts
    worker, copied = policy(folder, mine, stage=3), 0
    full_weights = worker.learner.full_weights

    def counted(*args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        nonlocal copied
        for name, tensor in full_weights(*args, **kwargs):
            copied += tensor.numel()
            yield name, tensor

    worker.learner.full_weights = counted  # type: ignore[method-assign]
    for step in range(2):
        worker.learn([experience(seed=step)], LearnJob(step, 0.0, 1.0, 0.0, seed=1))
    worker.save(place / "saved")
    worker.export(place / "export")
    return (0 if worker._average is None else len(worker._average.weights)), copied


def test_sharded_ranks_average_on_the_first_one(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    (held, copied), (held_besides, copied_besides) = run_ranks(on_two_ranks, 2, folder, tmp_path)
    assert held > 0 and held_besides == 0 and (tmp_path / "saved" / FILE).exists()
    alone = policy(folder, group())
    assert copied == 4 * sum(tensor.numel() for tensor in weights(alone).values())  # start, two steps, the export
    assert copied_besides == 0, "the other rank only takes part in gathering"
    for step in range(2):
        learn(alone, step)
    alone.export(tmp_path / "alone")
    one, other = (exported(tmp_path / name, torch.float32) for name in ("export", "alone"))
    assert all(torch.allclose(tensor, other[name], atol=2e-3) for name, tensor in one.items())
