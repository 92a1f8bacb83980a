"""Both sides of the comparison with TRL get the same work."""

from __future__ import annotations

from benchmarks.trl.work import Work
from benchmarks.trl_step import CONFIG, Steps, figures, our_config, our_overrides
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


def test_ppo_learns_a_critic_on_the_policys_trunk() -> None:
    config = load_config(CONFIG, our_overrides(3, 28, "ppo", 16))
    assert config.algorithm.name == "ppo" and config.policy.lora.rank == config.critic.lora.rank == 16


def test_each_side_is_compared_with_its_like_and_missing_ones_with_none() -> None:
    sides = {"ours, grpo": 1.0, "ours, ppo": 2.0, "ours, grpo, LoRA": 3.0, "ours, ppo, LoRA": 4.0}
    sides |= {"TRL, fp32 masters": 2.0, "TRL, LoRA": 6.0}
    work = Work("model", ["a"], 16, 4, 28, minibatches=4, epochs=1, learning_rate=1e-5, kl_coefficient=0.1, steps=2)
    made = figures({name: Steps([value], [60 / value]) for name, value in sides.items()}, work)
    assert {figure.name: figure.value for figure in made} == {
        "grpo ÷ TRL, fp32 masters: step": 0.5,
        "grpo ÷ TRL, fp32 masters: tokens/s": 2.0,
        "grpo, LoRA ÷ TRL, LoRA: step": 0.5,
        "grpo, LoRA ÷ TRL, LoRA: tokens/s": 2.0,
        "ppo ÷ TRL, fp32 masters: step": 1.0,
        "ppo ÷ TRL, fp32 masters: tokens/s": 1.0,
        "ppo, LoRA ÷ TRL, LoRA: step": 4 / 6,
        "ppo, LoRA ÷ TRL, LoRA: tokens/s": 1.5,
    }
    assert [figure.target for figure in made if figure.target is not None] == [0.5]
