"""The batch arithmetic of reinforcement learning, for display."""

from __future__ import annotations

import math

from jobs.stages.settings import critic_warmup_steps
from jobs.stages.stage import Row
from orchestrator.config.config import Config
from orchestrator.config.sections import LearnerConfig
from orchestrator.training.schedule import learning_rate


def batch_rows(config: Config, num_prompts: int) -> list[Row]:
    """Batch sizes of one step and of the run, as (name, value)."""
    rl, algorithm, rollout = config.rl, config.algorithm, config.rollout
    samples = config.samples_per_step
    shards = math.ceil(samples / rollout.shard_size)
    per_step = algorithm.epochs * algorithm.minibatches
    policy_steps = max(rl.steps - critic_warmup_steps(config), 0) * per_step
    optimizer_steps = f"policy {policy_steps}" + (f", critic {rl.steps * per_step}" if algorithm.needs_critic else "")
    critic_rates = (
        [("learning rate, critic", _rates(config.critic, rl.steps * per_step))] if algorithm.needs_critic else []
    )
    epochs = rl.steps * rl.prompts_per_step / num_prompts if num_prompts else math.inf
    return [
        ("samples per step", f"{rl.prompts_per_step} prompts × {rl.samples_per_prompt} = {samples}"),
        ("shards per step", f"{shards} of at most {rollout.shard_size}, on {rollout.replicas} engines"),
        ("tokens per step", f"at most {samples * config.model.max_length:,}"),
        (
            "optimizer steps per step",
            f"{algorithm.epochs} epochs × {algorithm.minibatches} minibatches of {samples // algorithm.minibatches} "
            f"samples = {per_step}",
        ),
        ("optimizer steps in all", f"{optimizer_steps}, in {rl.steps} steps"),
        ("learning rate, policy", _rates(config.policy, rl.steps * per_step)),
        *critic_rates,
        ("passes over the prompts", f"{rl.steps * rl.prompts_per_step} of {num_prompts} prompts = {epochs:.2f}"),
        *_best_checkpoint(config),
    ]


def _best_checkpoint(config: Config) -> list[Row]:
    """Candidate steps: those that are both saved and evaluated."""
    checkpoints, evaluation, last = config.checkpoints, config.evaluation, config.rl.steps
    if checkpoints.best_metric is None or not evaluation.prompts:
        return []
    common = math.lcm(checkpoints.every_steps, evaluation.every_steps)  # 0: one of them comes after the last step only
    earlier = list(range(common, last, common)) if common else []
    if not earlier:
        return [("best checkpoint", "the last: no earlier step is both saved and evaluated")]
    shown = ", ".join(map(str, earlier[:3])) + (", ..." if len(earlier) > 3 else "")
    return [("best checkpoint", f"by {checkpoints.best_metric}, among steps {shown} and {last}")]


def _rates(learner: LearnerConfig, total: int) -> str:
    def rate(step: int) -> float:
        return learning_rate(
            step,
            peak=learner.learning_rate,
            schedule=learner.schedule,
            warmup_optimizer_steps=learner.warmup_optimizer_steps,
            total_optimizer_steps=total,
        )

    text = f"{learner.schedule}: {rate(0):.2e} at the first, {rate(total - 1):.2e} at the last of {total}"
    if learner.warmup_optimizer_steps:
        text += f", {learner.learning_rate:.2e} after {learner.warmup_optimizer_steps}"
    return text
