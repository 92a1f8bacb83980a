"""Base class of algorithms: their common config keys and their interface."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from orchestrator.algorithms.advantages import Advantages, Responses
from orchestrator.algorithms.kl import adapted_coefficient
from orchestrator.config.base import NonNegativeNumber, Positive, PositiveNumber, Section
from orchestrator.config.sections import RlConfig, RolloutConfig


class Algorithm(Section):
    """Section `algorithm`. Subclasses add their own keys; table.py lists them.

    `needs_critic`: whether a critic is trained and provides values.
    `compares_samples`: whether the samples of a prompt are compared. They then stay in one shard and one minibatch.
    """

    needs_critic: ClassVar[bool] = False
    compares_samples: ClassVar[bool] = False

    name: str = ""
    """Name of the algorithm in orchestrator/algorithms/table.py."""
    minibatches: Positive = 1
    """Optimizer steps per epoch."""
    epochs: Positive = 1
    """Passes over a step's experience."""
    clip_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Policy clip range (Schulman 2017)."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""
    kl_estimator: Literal["k1-reward", "k3-loss"] = "k1-reward"
    """Estimator of the KL to the reference per token: k1 in the reward, or k3 in the loss."""
    kl_coefficient: NonNegativeNumber = 0.05
    """Weight of the KL penalty; initial value of the adaptive controller."""
    adaptive_kl_target: PositiveNumber | None = None
    """Target of the adaptive controller of kl_coefficient, in KL to the reference per response. Null: no controller."""
    kl_horizon_samples: Positive = 10_000
    """Horizon of the adaptive controller (Ziegler 2019)."""
    early_stop_kl: PositiveNumber | None = None
    """Stop a step's epochs early when the approximate KL to the policy at its start exceeds this. Null: off."""
    truncated: Literal["bootstrap", "penalise"] = "bootstrap"
    """Treatment of truncated responses. bootstrap: add the critic's value (no effect without a critic). penalise:
    subtract truncation_penalty."""
    truncation_penalty: NonNegativeNumber = 1.0
    """Reward subtracted from a truncated response (truncated: penalise)."""
    importance_cap: PositiveNumber | None = None
    """Cap of the importance weight between learner and engine. Null: off. Required if rl.max_staleness > 0."""

    @property
    def kl_in_reward(self) -> bool:
        """Whether -kl_coefficient · (log p_old - log p_ref) is added to each token's reward."""
        return self.kl_estimator == "k1-reward"

    def next_kl_coefficient(self, coefficient: float, observed_kl: float, num_samples: int) -> float:
        """The KL coefficient of the next step, given this step's KL per response: unchanged, or adapted (kl.py)."""
        if self.adaptive_kl_target is None:
            return coefficient
        return adapted_coefficient(
            coefficient,
            observed_kl,
            target=self.adaptive_kl_target,
            horizon_samples=self.kl_horizon_samples,
            num_samples=num_samples,
        )

    @abstractmethod
    def advantages(self, responses: Responses) -> Advantages:
        """Pure function of one shard's rows. The shard holds all samples of a prompt if they are compared."""

    def contradictions(self, rl: RlConfig, rollout: RolloutConfig) -> Iterator[str]:
        """Messages about contradicting keys, each with a remedy."""
        if rl.max_staleness and self.importance_cap is None:
            yield (
                f"rl.max_staleness={rl.max_staleness} needs algorithm.importance_cap: samples from older weights need "
                "importance weights. Set algorithm.importance_cap=2.0 or rl.max_staleness=0."
            )
        samples = rl.samples_per_step
        if samples % self.minibatches:
            lower = samples // self.minibatches * self.minibatches
            upper = lower + self.minibatches
            yield (
                f"rl.prompts_per_step × rl.samples_per_prompt = {samples} samples are not divisible by "
                f"algorithm.minibatches={self.minibatches}. The nearest valid sizes: {lower or upper} and {upper} "
                "samples."
            )
        if self.compares_samples:
            yield from self._groups_that_contradict(rl, rollout)

    def _groups_that_contradict(self, rl: RlConfig, rollout: RolloutConfig) -> Iterator[str]:
        """Messages about keys that would separate samples which must be compared."""
        name, size, shard = f"algorithm.name='{self.name}'", rl.samples_per_prompt, rollout.samples_per_shard
        if size < 2:
            yield (
                f"{name} compares the samples of a prompt and needs at least two, got "
                f"rl.samples_per_prompt={size}. Set rl.samples_per_prompt=4, or algorithm.name=ppo."
            )
        if rollout.reproducible and shard % size:
            yield (
                f"rollout.samples_per_shard={shard} would split the {size} samples of a prompt, which {name} compares. "
                f"Set it to {max(shard // size, 1) * size}."
            )
        if rl.prompts_per_step % self.minibatches:
            yield (
                f"rl.prompts_per_step={rl.prompts_per_step} is not divisible by "
                f"algorithm.minibatches={self.minibatches}; with {name} the samples of a prompt must stay in one "
                "minibatch. Change either."
            )
