"""A tiny model learns only from marked tokens: the others are input and do not contribute to the gradient."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from actors.learning import distributed
from actors.learning.heads import PolicyModel, ValueModel
from actors.learning.objectives.objective import LearnJob, Rows
from actors.learning.objectives.table import objective_of
from actors.learning.packing import TokenRows
from actors.models.model import load_causal, load_scorer
from actors.roles.critic import CriticWorker
from actors.roles.policy import PolicyWorker
from orchestrator import schema
from orchestrator.algorithms.ppo import Ppo
from orchestrator.config.sections import CriticConfig, LearnerConfig, PolicyConfig
from tests.numerics.ranks import context, group
from tests.numerics.samples import LENGTHS, experience
from tests.numerics.test_gradient_invariance import RecordingLearner
from tests.tiny import tiny_llama, tiny_scorer

PPO = Ppo(entropy_coefficient=0.01, kl_estimator="k3-loss", kl_coefficient=0.1, importance_cap=2.0)
JOB = LearnJob(step=0, advantage_mean=0.1, advantage_std=0.6, kl_coefficient=0.1, seed=1)
COLUMNS = ("old_logprobs", "ref_logprobs", "engine_logprobs", "advantages", "values", "returns")
CPU = torch.device("cpu")
GENERATOR = np.random.default_rng(3)
# Each row keeps its first token and about half of the others.
LEARN = [[True, *(GENERATOR.random(response - 1) < 0.5)] for _, response in LENGTHS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {"policy": tiny_llama(folder / "causal"), "critic": tiny_scorer(folder / "scorer")}


def marked(learn=LEARN, filler=None):
    """Experience with these marks; `filler` replaces the values at unmarked tokens."""
    table = experience()
    columns = {"learn": pa.array(learn, pa.list_(pa.bool_()))}
    for name in COLUMNS if filler is not None else ():
        rows = [np.where(marks, row, filler) for marks, row in zip(learn, table[name].to_pylist(), strict=True)]
        columns[name] = pa.array(rows, pa.list_(pa.float32()))
    arrays = {name: columns.get(name, table[name]) for name in table.column_names}
    return pa.table([arrays[name] for name in schema.EXPERIENCE.names], schema=schema.EXPERIENCE)


def learned(folders, role, table):
    """(metrics, weights) after a worker's step of two epochs and two minibatches."""
    ppo = PPO.model_copy(update={"epochs": 2, "minibatches": 2})
    around = context(folders[role], ppo, dtype="float32", total_optimizer_steps=4)
    keys = {"learning_rate": 3e-3, "micro_batch_tokens": 60}
    if role == "policy":
        worker = PolicyWorker(PolicyConfig(**keys), around, group())
    else:
        worker = CriticWorker(CriticConfig(path=str(folders[role]), **keys), around, group())
    metrics = worker.learn([table], JOB)
    return metrics, torch.cat([tensor.flatten() for _, tensor in worker.full_weights()])


@pytest.mark.parametrize("role", ["policy", "critic"])
@pytest.mark.parametrize("filler", [1e6, float("nan")])
def test_numbers_at_other_tokens_change_no_metric_and_no_weight(folders, role, filler):
    metrics, weights = learned(folders, role, marked())
    others, other_weights = learned(folders, role, marked(filler=filler))
    assert metrics == others
    assert torch.equal(weights, other_weights)
    assert not torch.equal(weights, learned(folders, role, experience())[1]), "the marks must have an effect"


def update_of(folders, role, rows, loss, *, count):
    learner_of = {
        "policy": lambda folder: PolicyModel(load_causal(folder, torch.float32), temperature=0.7),
        "critic": lambda folder: ValueModel(load_scorer(folder, torch.float32)),
    }
    learner = RecordingLearner(
        learner_of[role](folders[role]), LearnerConfig(learning_rate=1e-3), dtype="float32", total_optimizer_steps=1
    )
    micros = [rows.pack(part, CPU) for part in ((0, 1, 2), (3, 4, 5, 6, 7))]
    update = learner.update(micros, loss, count=count, what="test")
    return learner.gradient, update.means


@pytest.mark.parametrize("role", ["policy", "critic"])
def test_the_gradient_is_that_of_the_marked_terms_alone(folders, role):
    """Compares with the same loss over manually selected log-probs of the marked response tokens."""
    distributed.join(group())
    objective, table = objective_of(PPO), marked()
    marks = pa.array([[float(mark) for mark in row] for row in LEARN], pa.list_(pa.float32()))
    count = float(sum(map(sum, LEARN)))

    def terms(output, columns):
        if role == "policy":
            rows = Rows(columns, torch.tensor([len(output[0])]), mean_length=1.0, max_new_tokens=16)
            return objective.policy_terms(*output, rows, JOB)
        return objective.critic_terms(output, columns)

    def picked(output, micro):
        chosen = micro.columns["mark"] > 0
        kept = {name: micro.columns[name][chosen] for name in COLUMNS}
        return terms(tuple(part[chosen] for part in output) if role == "policy" else output[0][chosen], kept)

    def plain(output, micro):
        return terms(output if role == "policy" else output[0], micro.columns)

    by_hand = TokenRows.of_table(table.append_column("mark", marks), (*COLUMNS, "mark"))
    expected, means = update_of(folders, role, by_hand, picked, count=count)
    found, other_means = update_of(
        folders, role, TokenRows.of_table(table, COLUMNS, learned_only=True), plain, count=count
    )
    assert expected.norm() > 1e-2
    assert (found - expected).norm() / expected.norm() < 1e-5
    assert other_means == pytest.approx(means, rel=1e-5)
