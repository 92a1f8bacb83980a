"""What every algorithm is made of: the keys that all of them read, and the questions that the rest of the code asks."""

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
    """Section `algorithm`. A subclass adds the keys that only it reads; table.py names all of them.

    `needs_critic`: whether a critic gives values, and so starts and learns.
    `compares_samples`: whether the samples of a prompt are compared with each other; they then stay in one shard and in
    one minibatch.
    """

    needs_critic: ClassVar[bool] = False
    compares_samples: ClassVar[bool] = False

    name: str = ""
    """The algorithm, of orchestrator/algorithms/table.py."""
    minibatches: Positive = 1
    """Optimizer steps per epoch."""
    epochs: Positive = 1
    """Passes over a step's experience."""
    clip_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Policy clip range (Schulman 2017)."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""
    kl_estimator: Literal["k1-reward", "k3-loss"] = "k1-reward"
    """KL to the reference per token: k1 in the reward, or k3 in the loss."""
    kl_coefficient: NonNegativeNumber = 0.05
    """Weight of the KL penalty; start value of the adaptive controller."""
    adaptive_kl_target: PositiveNumber | None = None
    """KL to the reference per response that the adaptive controller of kl_coefficient aims at. Null: it is fixed."""
    kl_horizon_samples: Positive = 10_000
    """Horizon of the adaptive controller (Ziegler 2019)."""
    early_stop_kl: PositiveNumber | None = None
    """End a step's epochs early when the approximate KL to the policy at its start exceeds this. Null: never."""
    truncated: Literal["bootstrap", "penalise"] = "bootstrap"
    """A response cut by length: bootstrap with the critic (without a critic its reward is left as it is), or subtract
    truncation_penalty."""
    truncation_penalty: NonNegativeNumber = 1.0
    """Reward subtracted from a response that was cut by length (truncated: penalise)."""
    importance_cap: PositiveNumber | None = None
    """Cap of the truncated importance weight between learner and engine. Null: off; needed at rl.max_staleness > 0."""

    @property
    def kl_in_reward(self) -> bool:
        """Whether -kl_coefficient · (log p_old - log p_ref) is added to every token's reward."""
        return self.kl_estimator == "k1-reward"

    def next_kl_coefficient(self, coefficient: float, observed_kl: float, num_samples: int) -> float:
        """The coefficient after a step with this KL per response: the same, or adapted (see kl.py)."""
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
        """Pure; of the rows of one shard, which holds all samples of a prompt where they are compared."""

    def contradictions(self, rl: RlConfig, rollout: RolloutConfig) -> Iterator[str]:
        """What does not fit together, each with the way out."""
        if rl.max_staleness and self.importance_cap is None:
            yield (
                f"rl.max_staleness={rl.max_staleness} needs algorithm.importance_cap: samples come from older weights "
                "and must be weighted. Set algorithm.importance_cap=2.0 or rl.max_staleness=0."
            )
        samples = rl.samples_per_step
        if samples % self.minibatches:
            lower = samples // self.minibatches * self.minibatches
            upper = lower + self.minibatches
            yield (
                f"rl.prompts_per_step × rl.samples_per_prompt = {samples} samples do not divide into "
                f"algorithm.minibatches={self.minibatches}. The nearest sizes that do: {lower or upper} and {upper} "
                "samples."
            )
        if self.compares_samples:
            yield from self._groups_that_contradict(rl, rollout)

    def _groups_that_contradict(self, rl: RlConfig, rollout: RolloutConfig) -> Iterator[str]:
        """Samples of a prompt that are compared must stay together."""
        name, size, shard = f"algorithm.name='{self.name}'", rl.samples_per_prompt, rollout.samples_per_shard
        if size < 2:
            yield (
                f"{name} compares the samples of a prompt with each other and needs at least two, got "
                f"rl.samples_per_prompt={size}. Set rl.samples_per_prompt=4, or algorithm.name=ppo."
            )
        if rollout.reproducible and shard % size:
            yield (
                f"rollout.samples_per_shard={shard} would part samples of one prompt, of which {name} needs all {size} "
                f"together. Set it to {max(shard // size, 1) * size}."
            )
        if rl.prompts_per_step % self.minibatches:
            yield (
                f"rl.prompts_per_step={rl.prompts_per_step} prompts do not divide into "
                f"algorithm.minibatches={self.minibatches}, and with {name} the samples of a prompt stay in one "
                "minibatch. Change either."
            )
