"""What every algorithm is made of: the keys that all of them read, and the questions that the rest of the code asks."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from orchestrator.config.base import NonNegativeNumber, Positive, PositiveNumber, Section


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
