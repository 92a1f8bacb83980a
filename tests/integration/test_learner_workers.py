"""Policy, critic and reference workers as a group of two ranks."""

from pathlib import Path

import pytest
import torch

from actors.learning import zero
from actors.learning.objectives.objective import LearnJob
from actors.roles.critic import CriticWorker
from actors.roles.policy import PolicyWorker
from actors.roles.reference import ReferenceWorker
from orchestrator.algorithms.ppo import Ppo
from orchestrator.config.sections import CriticConfig, PolicyConfig, ReferenceConfig
from tests.numerics.ranks import context, run_ranks
from tests.numerics.samples import experience, rollout
from tests.tiny import tiny_llama, tiny_scorer

PPO = Ppo(minibatches=2, epochs=2)
JOB = LearnJob(step=0, advantage_mean=0.0, advantage_std=1.0, kl_coefficient=0.05, seed=1)
ROWS = [(3, 9), (12, 30), (2, 1), (5, 14), (7, 4)]  # odd: the ranks' shares differ


def one_step(mine, causal: Path, scorer: Path):
    zero.PERSISTENT_ELEMENTS = 0  # parameters really lie in parts
    learning = {"zero_stage": 3, "learning_rate": 1e-3, "gradient_checkpointing": True, "micro_batch_tokens": 40}
    parts = context(causal, PPO, dtype="bfloat16")
    policy = PolicyWorker(PolicyConfig(**learning), parts, mine)
    critic = CriticWorker(CriticConfig(path=str(scorer), **learning), parts, mine)
    found = {"world": mine.world_size}
    for sharded in (True, False):
        section = ReferenceConfig(sharded=sharded, micro_batch_tokens=40)
        found[f"reference {sharded}"] = ReferenceWorker(section, parts, mine).logprobs(rollout(ROWS)).to_pylist()
    found["logprobs"] = policy.logprobs(rollout(ROWS)).to_pylist()
    found["values"] = critic.values(rollout(ROWS)).to_pylist()
    found["policy"] = policy.learn([experience(ROWS)], JOB)
    found["critic"] = critic.learn([experience(ROWS)], JOB)
    found["weights"] = dict(policy.full_weights())
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return run_ranks(one_step, 2, tiny_llama(folder / "causal"), tiny_scorer(folder / "scorer"))


@pytest.mark.parametrize("what", ["logprobs", "values", "reference True", "reference False"])
def test_ranks_answer_for_their_own_rows(ranks, what):
    assert [row["row"] for row in ranks[0][what]] == [0, 2, 4]
    assert [row["row"] for row in ranks[1][what]] == [1, 3]
    column = "values" if what == "values" else "logprobs"
    for rank in (0, 1):
        assert [len(row[column]) for row in ranks[rank][what]] == [ROWS[row["row"]][1] for row in ranks[rank][what]]


def test_a_sharded_reference_says_what_a_whole_one_says(ranks):
    for rank in (0, 1):
        for one, other in zip(ranks[rank]["reference True"], ranks[rank]["reference False"], strict=True):
            assert one["logprobs"] == pytest.approx(other["logprobs"], abs=0.05)


def test_ranks_agree_on_metrics_and_weights(ranks):
    assert ranks[0]["policy"] == ranks[1]["policy"]
    assert ranks[0]["critic"] == ranks[1]["critic"]
    assert ranks[0]["policy"]["optimizer_steps"] == 4
    assert all(torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name]) for name in ranks[0]["weights"])
