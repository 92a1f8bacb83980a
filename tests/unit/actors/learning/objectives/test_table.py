"""All algorithms have both halves. A new algorithm is two small classes and two table lines."""

from __future__ import annotations

import inspect
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.learning.objectives import table as torch_half
from actors.learning.objectives.losses import LossTerms
from actors.learning.objectives.objective import Columns, LearnJob, Objective, Rows
from actors.learning.objectives.table import OBJECTIVES, objective_of
from orchestrator import schema
from orchestrator.algorithms import table as numpy_half
from orchestrator.algorithms.advantages import Advantages, Responses
from orchestrator.algorithms.algorithm import Algorithm
from orchestrator.algorithms.experience import ExperienceSettings, assemble
from orchestrator.algorithms.grpo import Grpo
from orchestrator.algorithms.ppo import Ppo
from orchestrator.algorithms.table import ALGORITHMS
from orchestrator.config.loader import load_config
from orchestrator.errors import ConfigError
from tests.unit.orchestrator.algorithms.test_experience import logprobs, rewards, rollout

JOB = LearnJob(step=0, advantage_mean=1.0, advantage_std=2.0, kl_coefficient=0.1, seed=0)
LOGPROBS, ENTROPY = torch.tensor([-1.0, -2.0]), torch.tensor([0.5, 0.5])
COLUMNS = {
    "old_logprobs": LOGPROBS,
    "ref_logprobs": LOGPROBS,
    "engine_logprobs": LOGPROBS,
    "advantages": torch.tensor([3.0, -1.0]),
    "values": torch.tensor([0.0, 1.0]),
    "returns": torch.tensor([2.0, 1.0]),
}


def rows_with(columns: Columns) -> Rows:
    return Rows(columns, torch.tensor([2]), mean_length=2.0, max_new_tokens=2)


def test_both_tables_have_the_same_names() -> None:
    assert list(OBJECTIVES) == list(ALGORITHMS)
    assert {name: section().name for name, section in ALGORITHMS.items()} == {name: name for name in ALGORITHMS}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_objective_reads_columns_that_the_log_has(name: str) -> None:
    objective = objective_of(ALGORITHMS[name]())
    assert {*objective.policy_columns, *objective.critic_columns} <= set(schema.EXPERIENCE.names)
    columns = {key: COLUMNS[key] for key in objective.policy_columns}
    terms = objective.policy_terms(LOGPROBS, ENTROPY, rows_with(columns), JOB)
    assert torch.isfinite(terms.loss)


def test_only_ppo_whitens_and_only_if_it_is_asked_to() -> None:
    # On policy the ratio is 1, so the loss is minus the sum of advantages: 3 - 1 = 2, whitened (3-1)/2 + (-1-1)/2 = 0.
    def loss(algorithm: Algorithm) -> float:
        return objective_of(algorithm).policy_terms(LOGPROBS, ENTROPY, rows_with(COLUMNS), JOB).loss.item()

    assert loss(Ppo()) == pytest.approx(0.0, abs=1e-6)
    assert loss(Ppo(whiten_advantages=False)) == loss(Grpo()) == -2.0


def test_an_algorithm_without_a_critic_has_no_critics_loss() -> None:
    # ½ · ((0 - 2)² + 0), unclipped
    assert objective_of(Ppo(clip_value=None)).critic_terms(COLUMNS["values"], COLUMNS).loss.item() == 2.0
    with pytest.raises(NotImplementedError, match="has no critic"):
        objective_of(Grpo()).critic_terms(COLUMNS["values"], COLUMNS)


# A complete algorithm: these two classes, and a line in each table.
class Idle(Algorithm):
    name: Literal["idle"] = "idle"

    def advantages(self, responses: Responses) -> Advantages:
        nothing_N = np.zeros_like(responses.token_rewards_N)
        return Advantages(nothing_N, nothing_N, nothing_N)


class IdleObjective(Objective):
    def __init__(self, algorithm: Idle) -> None:
        pass

    def policy_terms(self, logprobs_N: Tensor, entropy_N: Tensor, rows: Rows, job: LearnJob) -> LossTerms:
        return LossTerms(0.0 * logprobs_N.sum(), {})


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(numpy_half.ALGORITHMS, "idle", Idle)  # type: ignore[arg-type]
    monkeypatch.setitem(torch_half.OBJECTIVES, "idle", IdleObjective)  # type: ignore[arg-type]


@pytest.mark.usefixtures("idle")
def test_an_algorithm_is_two_small_classes_and_two_table_lines() -> None:
    assert sum(len(inspect.getsource(half).splitlines()) for half in (Idle, IdleObjective)) < 15
    config = load_config(None, ["reward.path=/models/reward", "algorithm.name=idle", "algorithm.epochs=3"])
    algorithm = config.algorithm
    assert isinstance(algorithm, Idle) and algorithm.epochs == 3 and not algorithm.needs_critic
    table, _ = assemble(
        rollout(),
        logprobs=[logprobs(-1.0)],
        ref_logprobs=[logprobs(-1.5)],
        values=[],
        rewards=[rewards([1.0, 2.0, 3.0])],
        settings=ExperienceSettings(algorithm, config.rl.samples_per_prompt),
        kl_coefficient=0.0,
    )
    assert table["advantages"].to_pylist() == [[0.0, 0.0], [0.0] * 3, [0.0]]
    assert table["token_rewards"].to_pylist() == [[0.0, 1.0], [0.0, 0.0, 2.0], [3.0]]
    logprobs_N = LOGPROBS.clone().requires_grad_()
    objective_of(algorithm).policy_terms(logprobs_N, ENTROPY, rows_with({}), JOB).loss.backward()
    assert logprobs_N.grad is not None and not logprobs_N.grad.any()


def test_without_its_table_line_an_algorithm_is_refused() -> None:
    with pytest.raises(ConfigError, match="algorithm.name: must be one of"):
        load_config(None, ["reward.path=/models/reward", "algorithm.name=idle"])
