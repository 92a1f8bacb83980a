"""The gradient of a minibatch does not depend on the micro-batch size, the number of ranks or the ZeRO stage."""

from pathlib import Path

import pytest
import torch
from deepspeed.utils import safe_get_full_grad

from actors.learning import distributed
from actors.learning.heads import PolicyModel, ValueModel
from actors.learning.learner import Learner
from actors.learning.objectives.losses import value_loss
from actors.learning.objectives.objective import LearnJob
from actors.learning.objectives.table import objective_of
from actors.learning.packing import TokenRows
from actors.models.model import load_causal, load_scorer
from orchestrator.algorithms.ppo import Ppo
from orchestrator.config.sections import LearnerConfig
from orchestrator.planning.balance import plan_minibatches
from tests.numerics.ranks import group, run_ranks
from tests.numerics.samples import experience, rows_of
from tests.tiny import tiny_llama, tiny_scorer

PPO = Ppo(entropy_coefficient=0.01, kl_estimator="k3-loss", kl_coefficient=0.1, importance_cap=2.0, clip_value=0.2)
JOB = LearnJob(step=0, advantage_mean=0.1, advantage_std=0.6, kl_coefficient=0.1, seed=1)
COLUMNS = ("old_logprobs", "ref_logprobs", "engine_logprobs", "advantages", "values", "returns")
ONE_MICRO_BATCH, FEW_TOKENS = 100_000, 45
STAGES = (0, 1, 2, 3)


class RecordingLearner(Learner):
    """Records the full gradient of an update."""

    gradient: torch.Tensor

    def _apply(self, what):
        parameters = list(self._pretrained.parameters())
        if self._stage:
            gradients = [safe_get_full_grad(parameter) for parameter in parameters]
        else:
            gradients = [parameter.grad for parameter in parameters]
        self.gradient = torch.cat([gradient.flatten().double() for gradient in gradients])
        return super()._apply(what)


def policy_objective(output, micro):
    return objective_of(PPO).policy_terms(*output, rows_of(micro), JOB)


def critic_objective(output, micro):
    return value_loss(output[0], micro.columns["values"], micro.columns["returns"], clip_value=0.2)


def measure(mine, causal: Path, scorer: Path, micro_batch_tokens: int, stages=STAGES):
    """{(role, stage): (gradient, loss, grad norm, weights after the step, micro-batches)} of one update."""
    found = {}
    for role in ("policy", "critic"):
        for stage in stages:
            if role == "policy":
                model = PolicyModel(load_causal(causal, torch.float32), temperature=0.7, chunk=16)
                objective = policy_objective
            else:
                model = ValueModel(load_scorer(scorer, torch.float32))
                objective = critic_objective
            learner = RecordingLearner(
                model, LearnerConfig(zero_stage=stage, learning_rate=1e-3), dtype="float32", total_optimizer_steps=1
            )
            rows = TokenRows.of_table(experience(), COLUMNS)
            plan = plan_minibatches(
                rows.lengths,
                num_minibatches=1,
                num_ranks=mine.world_size,
                micro_batch_tokens=micro_batch_tokens,
                seed=0,
            )[0][mine.rank]
            micros = [rows.pack(micro, torch.device("cpu")) for micro in plan]
            update = learner.update(micros, objective, count=float(rows.response_lengths.sum()), what="test")
            weights = torch.cat([tensor.flatten().double() for _, tensor in learner.full_weights()])
            loss = update.means["policy_loss" if role == "policy" else "loss"]
            found[role, stage] = (learner.gradient, loss, update.grad_norm, weights, [len(m) for m in plan])
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return tiny_llama(folder / "causal"), tiny_scorer(folder / "scorer")


@pytest.fixture(scope="module")
def measured(folders):
    """By name: the simple case (one process, stage 0, one micro-batch) and all others."""
    distributed.join(group())
    alone = group()
    two_ranks = run_ranks(measure, 2, *folders, FEW_TOKENS)
    return {
        "one rank, one micro-batch": measure(alone, *folders, ONE_MICRO_BATCH),
        "one rank, few tokens": measure(alone, *folders, FEW_TOKENS),
        "two ranks, rank 0": two_ranks[0],
        "two ranks, rank 1": two_ranks[1],
    }


def test_the_cases_differ_as_they_should(measured):
    assert measured["one rank, one micro-batch"]["policy", 0][4] == [8]
    assert len(measured["one rank, few tokens"]["policy", 0][4]) > 3
    sizes = [measured[f"two ranks, rank {rank}"]["policy", 0][4] for rank in (0, 1)]
    assert len(sizes[0]) == len(sizes[1])
    assert 0 in sizes[0] + sizes[1], "one rank must have a dummy micro-batch, so that this test covers it"


@pytest.mark.parametrize("role", ["policy", "critic"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", ["one rank, one micro-batch", "one rank, few tokens", "two ranks, rank 0"])
def test_gradient_loss_norm_and_weights_do_not_depend_on_the_layout(measured, case, stage, role):
    gradient, loss, norm, weights, _ = measured[case][role, stage]
    plain_gradient, plain_loss, plain_norm, plain_weights, _ = measured["one rank, one micro-batch"][role, 0]
    assert plain_gradient.norm() > 1e-2
    assert (gradient - plain_gradient).norm() / plain_gradient.norm() < 1e-5
    assert (gradient - plain_gradient).abs().max() / plain_gradient.abs().max() < 1e-5
    assert loss == pytest.approx(plain_loss, rel=1e-5)
    assert norm == pytest.approx(plain_norm, rel=1e-5)
    assert (weights - plain_weights).norm() / plain_weights.norm() < 1e-5


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_hold_the_same_weights(measured, stage):
    for role in ("policy", "critic"):
        weights = [measured[f"two ranks, rank {rank}"][role, stage][3] for rank in (0, 1)]
        assert torch.equal(*weights)
