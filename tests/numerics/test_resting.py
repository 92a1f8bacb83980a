"""A learner that gives back its memory between uses learns the same bits as one that does not."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.learning import distributed, resting, zero
from actors.learning.distributed import Group
from actors.learning.heads import PolicyModel, probe
from actors.learning.learner import Learner
from actors.learning.objectives.objective import LearnJob
from actors.learning.resting import Rest
from actors.models.model import load_causal, torch_dtype
from actors.roles.policy import PolicyWorker
from orchestrator.algorithms.ppo import Ppo
from orchestrator.config.base import Dtype
from orchestrator.config.sections import CriticConfig, LoraConfig, PolicyConfig
from tests.numerics.ranks import by_world, context, group
from tests.numerics.samples import experience, rollout
from tests.numerics.test_save_and_load import CONFIG, learn, weights
from tests.tiny import tiny_llama

CPU = torch.device("cpu")
STAGES = (0, 1, 2, 3)
STEPS = 2
CASES = [(stage, dtype) for stage in STAGES for dtype in ("bfloat16", "float32")]


def storages() -> dict[int, torch.UntypedStorage]:
    """Of all tensors of this process."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if issubclass(type(found), Tensor) and found.device == CPU]
    found = [tensor.untyped_storage() for tensor in tensors]
    return {storage._cdata: storage for storage in found}


def output(learner: Learner) -> Tensor:
    return learner.pass_through(probe(learner._model, CPU))[0].clone()


def rested_and_not(mine: Group, causal: Path, folder: Path, cases: Any) -> Any:
    """Per case: weights without a rest and with, outputs in a half rest and without, bytes held awake, half, at rest"""
    zero.PERSISTENT_ELEMENTS = 0
    resting._BLOCK_BYTES = 1 << 16  # several blocks, and storages that lie on their edges
    return {case: (_never_rested(causal, *case), *_rested(causal, *case)) for case in cases}


def make(causal: Path, stage: int, dtype: Dtype) -> Learner:
    """With weights in memory of their own, as on a GPU, and not in a mapped file."""
    model = PolicyModel(load_causal(causal, torch_dtype(dtype)), temperature=1.0)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return Learner(model, CONFIG.model_copy(update={"zero_stage": stage}), dtype=dtype, total_optimizer_steps=8)


def _never_rested(causal: Path, stage: int, dtype: Dtype) -> dict[str, Tensor]:
    learner = make(causal, stage, dtype)
    learn(learner, range(STEPS))
    return weights(learner)


def _rested(causal: Path, stage: int, dtype: Dtype) -> tuple[dict[str, Tensor], Tensor, Tensor, list[int]]:
    before = storages()
    learner = make(causal, stage, dtype)

    def size() -> int:
        others = before.keys() | {block.untyped_storage()._cdata for block in learner._rest._blocks}
        return sum(storage.nbytes() for key, storage in storages().items() if key not in others)

    for step in range(STEPS):
        learner.rest()
        learner.resume()
        learn(learner, [step])
        awake = output(learner)
        sizes = [size()]
        learner.rest(keeps_weights=True)
        sizes.append(size())
        half = output(learner)
        learner.rest()
        sizes.append(size())
        learner.resume()
    return weights(learner), awake, half, sizes


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("causal"))


@pytest.fixture(scope="module")
def measured(causal: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return by_world(rested_and_not, tmp_path_factory, causal, CASES, of_two=[(stage, "bfloat16") for stage in STAGES])


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero, "PERSISTENT_ELEMENTS", zero.PERSISTENT_ELEMENTS)
    monkeypatch.setattr(resting, "_BLOCK_BYTES", resting._BLOCK_BYTES)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("world", "dtype"), [("one", "bfloat16"), ("one", "float32"), ("two", "bfloat16")])
def test_a_learner_that_rests_in_every_step_ends_with_the_same_bits(measured, world, stage, dtype):
    straight, rested, awake, half, _ = measured[world][stage, dtype]
    assert straight.keys() == rested.keys()
    assert all(torch.equal(straight[name], rested[name]) for name in straight)
    assert torch.equal(awake, half)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("world", "dtype"), [("one", "bfloat16"), ("one", "float32"), ("two", "bfloat16")])
def test_a_rest_frees_nearly_all_and_a_half_rest_all_but_the_weights(measured, world, stage, dtype):
    awake, half, rest = measured[world][stage, dtype][4]
    assert rest < 0.03 * awake
    numbers = sum(tensor.numel() for tensor in measured[world][stage, dtype][0].values())
    whole = (2 if dtype == "bfloat16" else 4) * numbers
    kept = whole / 2 if stage == 3 and world == "two" else whole
    assert 0.9 * kept < half < 1.3 * kept < awake


def test_a_learner_at_rest_refuses_to_compute(causal: Path) -> None:
    distributed.join(group())
    learner = make(causal, 1, "bfloat16")
    learner.rest(keeps_weights=True)
    with pytest.raises(AssertionError, match="call resume first"):
        learn(learner, [0])
    learner.rest()
    with pytest.raises(AssertionError, match="call resume first"):
        output(learner)
    learner.resume()
    learn(learner, [0])


def test_aliases_and_views_stay_what_they_were() -> None:
    whole = torch.arange(40.0)
    part, other = whole[8:16], whole.view(4, 10).T
    rest = Rest(CPU)
    rest.leave([part])
    assert rest.num_bytes == 160 and whole.untyped_storage().nbytes() == 0
    rest.come_back()
    assert torch.equal(whole, torch.arange(40.0)) and torch.equal(part, whole[8:16])
    whole[8] = -1.0
    assert part[0] == other[8, 0] == -1.0


def test_a_critic_on_the_policys_trunk_rests_with_it(causal: Path) -> None:
    lora = LoraConfig(rank=4)
    parts = context(causal, Ppo(minibatches=2), dtype="bfloat16")

    def worker() -> PolicyWorker:
        settings = {"lora": lora, "learning_rate": 1e-2}
        return PolicyWorker(PolicyConfig(**settings), parts, group(), critic=CriticConfig(**settings))

    def one_step(found: PolicyWorker, *, rests: bool) -> list[Any]:
        told = []
        for name in ("logprobs", "critic_values"):
            told.append(getattr(found, name)(rollout()).to_pylist())
            if rests:
                found.rest(keeps_weights=True)
        if rests:
            found.rest()
            found.resume()
        job = LearnJob(step=0, advantage_mean=0.0, advantage_std=1.0, kl_coefficient=0.05, seed=1)
        return [*told, found.learn([experience()], job), found.critic_learn([experience()], job)]

    straight, rested = worker(), worker()
    for _ in range(2):
        assert one_step(straight, rests=False) == one_step(rested, rests=True)
    for (name, one), (_, other) in zip(straight.full_weights(), rested.full_weights(), strict=True):
        assert torch.equal(one, other), name
