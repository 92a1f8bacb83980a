"""Settings of ZeRO that are meant for GPUs compute what learners without them compute, over two ranks of the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from actors.learning import zero
from actors.learning.distributed import Group
from actors.learning.heads import PolicyModel
from actors.learning.learner import Learner
from actors.models.model import load_causal, torch_dtype
from orchestrator.config.base import Dtype
from orchestrator.errors import NonFiniteError
from tests.numerics.ranks import run_ranks
from tests.numerics.test_save_and_load import CONFIG, learn, weights
from tests.tiny import tiny_llama

CASES = [(stage, dtype, {"offload_optimizer": True}) for stage in (1, 2, 3) for dtype in ("float32", "bfloat16")] + [
    (3, dtype, {"zero_hpz_partition_size": 2}) for dtype in ("float32", "bfloat16")
]
STEPS = 4


def key(stage: int, dtype: Dtype, settings: dict[str, Any]) -> tuple[int, str, str]:
    return stage, dtype, next(iter(settings))


def make(causal: Path, stage: int, dtype: Dtype, settings: dict[str, Any]) -> Learner:
    model = PolicyModel(load_causal(causal, torch_dtype(dtype)), temperature=1.0)
    config = CONFIG.model_copy(update={"zero_stage": stage, **settings})
    return Learner(model, config, dtype=dtype, total_optimizer_steps=8)


def with_and_without(mine: Group, causal: Path, folder: Path) -> dict[Any, Any]:
    """Per case: weights at the start, after steps without the setting, with it, with it and a reload; whether the
    optimizer's tensors are on the host in an offload; and whether a bad gradient was refused."""
    zero.PERSISTENT_ELEMENTS = 0
    found = {}
    for stage, dtype, settings in CASES:
        place = folder / "-".join(map(str, key(stage, dtype, settings)))
        place.mkdir(exist_ok=True)
        plain = make(causal, stage, dtype, {})
        start = weights(plain)
        learn(plain, range(STEPS))
        learner = make(causal, stage, dtype, settings)
        learn(learner, range(2))
        learner.save(place)
        learn(learner, range(2, STEPS))
        resumed = make(causal, stage, dtype, settings)
        resumed.load(place)
        learn(resumed, range(2, STEPS))
        found[key(stage, dtype, settings)] = (
            start,
            weights(plain),
            weights(learner),
            weights(resumed),
            _refuses(learner),
        )
    return found


def _refuses(learner: Learner) -> bool:
    before = weights(learner)
    original = learner._engine.backward

    def poisoned(loss: torch.Tensor, **options: Any) -> Any:
        return original(loss * torch.tensor(torch.inf), **options)

    learner._engine.backward = poisoned
    try:
        learn(learner, [7])
    except NonFiniteError:
        after = weights(learner)
        return all(torch.equal(before[name], after[name]) for name in before)
    return False


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Any:
    causal = tiny_llama(tmp_path_factory.mktemp("causal"))
    return run_ranks(with_and_without, 2, causal, tmp_path_factory.mktemp("saved"))[0]


@pytest.mark.parametrize("case", [key(*case) for case in CASES])
def test_the_weights_are_those_of_a_learner_without_it(measured: Any, case: Any) -> None:
    start, plain, found, _, _ = measured[case]
    moved = torch.cat([(plain[name] - start[name]).flatten() for name in start]).norm()
    differs = torch.cat([(found[name] - plain[name]).flatten() for name in start]).norm()
    assert moved > 0.05 and differs <= (1e-4 if case[1] == "float32" else 0.15) * moved


@pytest.mark.parametrize("case", [key(*case) for case in CASES])
def test_a_reload_continues_with_the_same_bits(measured: Any, case: Any) -> None:
    _, _, found, resumed, _ = measured[case]
    assert all(torch.equal(found[name], resumed[name]) for name in found)


@pytest.mark.parametrize("case", [key(*case) for case in CASES])
def test_an_infinite_gradient_is_not_applied(measured: Any, case: Any) -> None:
    assert measured[case][4]
