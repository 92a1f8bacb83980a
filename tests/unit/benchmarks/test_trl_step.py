"""Both sides of the comparison with TRL get the same work."""

from __future__ import annotations

from benchmarks.trl.work import Work
from benchmarks.trl_step import CONFIG, our_config, our_overrides
from orchestrator.config.loader import load_config


def test_both_sides_do_grpo() -> None:
    config = our_config(3, 28)
    algorithm = config.algorithm
    assert (algorithm.name, algorithm.kl_estimator, config.rl.samples_per_prompt) == ("grpo", "k3-loss", 4)


def test_the_longest_prompt_and_response_fit() -> None:
    config = load_config(CONFIG, our_overrides(3, 100))
    assert config.model.max_length == config.prompts.max_prompt_tokens + config.rollout.max_new_tokens


def test_minibatches_of_a_step_hold_all_its_samples() -> None:
    work = Work("model", ["a"], 16, 4, 28, minibatches=4, epochs=2, learning_rate=1e-5, kl_coefficient=0.1, steps=1)
    assert work.samples_per_minibatch == 16
    assert work.optimizer_steps == 8
