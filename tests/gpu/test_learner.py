"""A learner in bf16 on a GPU gives the same results as in fp32 on the host, and needs no more memory than planned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from actors.learning.objectives.objective import LearnJob
from actors.models.model import resolve_model
from actors.models.size import model_size
from actors.roles.policy import PolicyWorker
from jobs.quickstart import CONFIG
from orchestrator.algorithms.ppo import Ppo
from orchestrator.config.loader import load_config
from orchestrator.config.sections import PolicyConfig
from orchestrator.planning.memory import Sharding, learner_memory
from tests.integration.engine_scenarios import reference_logprobs
from tests.numerics.ranks import context, group
from tests.numerics.samples import experience, rollout
from tests.tiny import tiny_llama

JOB = LearnJob(step=3, advantage_mean=0.0, advantage_std=1.0, kl_coefficient=0.05, seed=1)
MICRO_BATCH_TOKENS = 2048
FULL = [(64, 192)] * 16  # enough rows to fill micro-batches


def policy_of(folder: Path, *, minibatches: int = 2) -> PolicyWorker:
    learner = PolicyConfig(learning_rate=3e-3, micro_batch_tokens=MICRO_BATCH_TOKENS)
    ppo = Ppo(minibatches=minibatches, epochs=2)
    return PolicyWorker(learner, context(folder, ppo, dtype="bfloat16"), group())


def test_log_probs_in_bf16_are_those_of_fp32_and_the_first_ratio_is_one(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    policy, table = policy_of(folder), rollout()
    old = policy.logprobs(table)
    told = [value for row in old["logprobs"].to_pylist() for value in row]
    exact = [value for row in reference_logprobs(folder, table.to_pylist(), 1.0) for value in row]
    assert np.abs(np.subtract(told, exact)).mean() < 0.02
    metrics = policy.learn([experience(old_logprobs=old["logprobs"])], JOB)
    assert metrics["first_ratio_mean"] == pytest.approx(1.0, abs=0.02)
    assert metrics["optimizer_steps"] == 4
    assert abs(metrics["ratio_max"] - 1) > 3e-3, "later minibatches must have moved"


def test_what_was_saved_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    first, second = policy_of(folder), policy_of(folder)
    table = experience(old_logprobs=first.logprobs(rollout())["logprobs"])
    first.learn([table], JOB)
    first.save(tmp_path / "saved")
    second.load(tmp_path / "saved")
    for (name, ours), (_, theirs) in zip(first.full_weights(), second.full_weights(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_memory_plan_holds_what_learning_needed() -> None:
    """The quickstart's model. The plan may be too large but not too small."""
    config = load_config(CONFIG)
    folder = resolve_model(config.model.path, config.run.cache)
    torch.cuda.reset_peak_memory_stats()
    policy = policy_of(folder, minibatches=1)
    old = policy.logprobs(rollout(FULL))
    policy.learn([experience(FULL, old_logprobs=old["logprobs"])], JOB)
    measured = torch.cuda.max_memory_allocated()
    planned = learner_memory(
        model_size(folder),
        Sharding("bfloat16", 1, 1),
        micro_batch_tokens=MICRO_BATCH_TOKENS,
        gradient_checkpointing=False,
        logits=True,
    )
    assert planned.state < measured < planned.on_device
