"""PPO-ptx: the loss of demonstrations beside that of experience, by the formula and whatever the micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from actors.learning.heads import PolicyModel
from actors.learning.objectives.losses import LossTerms
from actors.learning.objectives.objective import LearnJob
from actors.learning.packing import TokenRows
from actors.learning.worker import MixedIn
from actors.models.model import load_causal
from actors.roles.policy import PolicyWorker
from orchestrator.algorithms.ppo import Ppo
from orchestrator.config.sections import PolicyConfig
from tests.numerics.ranks import context, group
from tests.numerics.samples import experience
from tests.tiny import tiny_llama

JOB = LearnJob(step=3, advantage_mean=0.1, advantage_std=0.6, kl_coefficient=0.1, seed=1)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"))


def demonstrations(count: int = 6) -> pa.Table:
    generator = np.random.default_rng(5)
    prompts = [generator.integers(4, 300, size=3 + number).tolist() for number in range(count)]
    responses = [generator.integers(4, 300, size=4 + number % 3).tolist() for number in range(count)]
    learn = [[True, *(generator.random(len(response) - 1) < 0.7)] for response in responses]
    return pa.table(
        {
            "prompt_tokens": pa.array(prompts, pa.list_(pa.int32())),
            "response_tokens": pa.array(responses, pa.list_(pa.int32())),
            "learn": pa.array(learn, pa.list_(pa.bool_())),
        }
    )


def learned(folder: Path, mixed_in: MixedIn | None, *, tokens: int = 60) -> tuple[dict[str, float], torch.Tensor]:
    algorithm = Ppo(epochs=1, minibatches=2)
    around = context(folder, algorithm, dtype="float32", total_optimizer_steps=2)
    learner = PolicyConfig(learning_rate=1e-3, micro_batch_tokens=tokens)
    worker = PolicyWorker(learner, around, group(), mixed_in)
    metrics = worker.learn([experience()], JOB)
    return metrics, torch.cat([tensor.flatten() for _, tensor in worker.full_weights()])


def test_the_metric_is_the_mean_negative_log_likelihood_of_learned_tokens(folder: Path) -> None:
    """One optimizer step over all rows, so that the weights are those of the start."""
    table = demonstrations()
    mixed = MixedIn(table, coefficient=0.5, num_rows=6)
    micros, loss = mixed.step(
        lambda output, micro: LossTerms(output[0].sum(), {}),
        (1, 2),
        group(),
        count=10.0,
        micro_batch_tokens=40,
        device=CPU,
    )
    model = PolicyModel(load_causal(folder, torch.float32), temperature=1.0)
    terms = [loss(model(micro), micro) for micro in micros]
    rows = TokenRows.of_table(table, learned_only=True)
    whole = rows.pack(range(6), CPU)
    expected = float(-model(whole)[0].detach().mean())
    assert sum(float(term.sums["ptx_loss"]) for term in terms) / 10.0 == pytest.approx(expected, rel=1e-5)
    assert sum(float(term.loss) for term in terms) / 10.0 == pytest.approx(0.5 * expected, rel=1e-5)
    assert len(micros) > 1 and loss(model(whole), whole).sums == {}, "other micro-batches keep their own loss"


def test_it_is_learned_with_the_experience_and_does_not_depend_on_micro_batches(folder: Path) -> None:
    def mixed() -> MixedIn:
        return MixedIn(demonstrations(), coefficient=2.0, num_rows=4)

    alone, plain = learned(folder, None)
    metrics, weights = learned(folder, mixed())
    again, same = learned(folder, mixed(), tokens=200)
    assert "ptx_loss" not in alone and metrics["ptx_loss"] > 1.0
    assert not torch.equal(plain, weights)
    assert metrics["ptx_loss"] == pytest.approx(again["ptx_loss"], rel=1e-5)
    assert torch.allclose(weights, same, atol=1e-5)


def test_the_rows_of_a_step_follow_from_its_number(folder: Path) -> None:
    def rows(*seed: int) -> Any:
        mixed = MixedIn(demonstrations(30), coefficient=1.0, num_rows=5)
        micros, _ = mixed.step(
            lambda output, micro: LossTerms(output[0], {}), seed, group(), count=1.0, micro_batch_tokens=40, device=CPU
        )
        return [micro.rows for micro in micros]

    assert rows(1, 0, 0, 0) == rows(1, 0, 0, 0)
    assert len({str(rows(1, step, 0, minibatch)) for step in range(3) for minibatch in range(2)}) == 6
