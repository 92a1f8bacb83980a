"""On policy, the ratios of the first minibatch are 1: log-probs for the log and for learning come from one computation,
at the sampling temperature."""

import pytest

from actors.learning.objectives.objective import LearnJob
from actors.roles.policy import PolicyWorker
from actors.roles.reference import ReferenceWorker
from orchestrator.algorithms.ppo import Ppo
from orchestrator.config.sections import PolicyConfig, ReferenceConfig
from tests.numerics.ranks import context, group
from tests.numerics.samples import experience, rollout
from tests.tiny import tiny_llama

JOB = LearnJob(step=3, advantage_mean=0.0, advantage_std=1.0, kl_coefficient=0.05, seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("causal"))


def worker(folder, *, dtype, temperature, algorithm, micro_batch_tokens=2048):
    learner = PolicyConfig(learning_rate=3e-3, micro_batch_tokens=micro_batch_tokens)
    return PolicyWorker(learner, context(folder, algorithm, dtype=dtype, temperature=temperature), group())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 0.1), ("float32", 1e-4)])
def test_the_first_ratio_is_one_within_the_compute_types_error(folder, dtype, error, temperature):
    policy = worker(folder, dtype=dtype, temperature=temperature, algorithm=Ppo(minibatches=2, epochs=2))
    policy.micro_batch_tokens = 64  # differs from the micro-batches of learning
    old = policy.logprobs(rollout())
    policy.micro_batch_tokens = 2048
    metrics = policy.learn([experience(old_logprobs=old["logprobs"])], JOB)
    assert metrics["first_ratio_mean"] == pytest.approx(1.0, abs=error / 5)
    assert metrics["first_ratio_deviation_max"] < 1 + error
    assert metrics["optimizer_steps"] == 4
    assert metrics["epochs"] == 2
    assert abs(metrics["ratio_max"] - 1) > 3e-3, "ratios of later minibatches must differ from 1"


def test_a_wrong_temperature_shows_in_the_first_ratio(folder):
    old = worker(folder, dtype="float32", temperature=0.7, algorithm=Ppo()).logprobs(rollout())
    metrics = worker(folder, dtype="float32", temperature=1.0, algorithm=Ppo()).learn(
        [experience(old_logprobs=old["logprobs"])], JOB
    )
    assert metrics["first_ratio_deviation_max"] > 1.5


def test_policy_and_reference_agree_where_they_are_the_same_model(folder):
    policy = worker(folder, dtype="float32", temperature=0.7, algorithm=Ppo())
    reference = ReferenceWorker(
        ReferenceConfig(micro_batch_tokens=30), context(folder, Ppo(), dtype="float32", temperature=0.7), group()
    )
    ours, theirs = policy.logprobs(rollout()), reference.logprobs(rollout())
    assert ours["row"].to_pylist() == theirs["row"].to_pylist() == list(range(8))
    for one, other in zip(ours["logprobs"].to_pylist(), theirs["logprobs"].to_pylist(), strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_early_stop_kl_ends_the_epochs(folder):
    def steps(early_stop_kl):
        policy = worker(folder, dtype="float32", temperature=1.0, algorithm=Ppo(epochs=6, early_stop_kl=early_stop_kl))
        old = policy.logprobs(rollout())
        return policy.learn([experience(old_logprobs=old["logprobs"])], JOB)["optimizer_steps"]

    assert steps(None) == 6
    assert steps(1e-4) < 6
