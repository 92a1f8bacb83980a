"""Base class of algorithms: their common config keys and their interface."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from orchestrator.algorithms.advantages import Advantages, Responses
from orchestrator.algorithms.kl import adapted_coefficient
from orchestrator.config.base import (
    Fraction,
    NonNegative,
    NonNegativeNumber,
    Positive,
    PositiveNumber,
    Section,
    changed_key,
)
from orchestrator.config.sections import RlConfig, RolloutConfig

Aggregation = Literal["token", "sample", "constant"]
KlEstimator = Literal[
    "k1-reward", "k2-reward", "k3-reward", "k1-loss", "k2-loss", "k3-loss", "unbiased-loss"
]  # what is estimated how, and where it is subtracted


class Algorithm(Section):
    """Section `algorithm`. Subclasses add their own keys and defaults; table.py lists them.

    `needs_critic`: whether a critic is trained and provides values.
    `compares_samples`: whether the samples of a prompt are compared. They then stay in one shard and one minibatch.
    `greedy_samples`: samples per prompt, in addition to rl.samples_per_prompt, that are drawn at temperature 0 as a
        baseline and not learned from.
    """

    needs_critic: ClassVar[bool] = False
    compares_samples: ClassVar[bool] = False
    greedy_samples: ClassVar[int] = 0

    name: str = ""
    """Name of the algorithm in orchestrator/algorithms/table.py."""
    minibatches: Positive = 1
    """Optimizer steps per epoch."""
    epochs: Positive = 1
    """Passes over a step's experience."""
    clip_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Policy clip range (Schulman 2017)."""
    clip_ratio_high: PositiveNumber | None = None
    """Clip range above 1 (clip-higher of Yu 2025, DAPO). Null: clip_ratio."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound c of the ratio where the advantage is negative (Ye 2020): the loss of a token is at most c times its
    |advantage|. Null: off."""
    aggregation: Aggregation = "token"
    """Weight of a token in the policy's loss. token: all tokens of a minibatch the same. sample: all samples the same,
    the mean over samples of the mean over their tokens. constant: the sum over a sample's tokens divided by
    rollout.max_new_tokens, then the mean over samples (Liu 2025, Dr. GRPO); with an environment, by the most tokens of
    all turns."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""
    kl_estimator: KlEstimator = "k1-reward"
    """Estimator of the KL to the reference per token (Schulman 2020: k1, k2, k3), and whether it is subtracted from
    the reward or added to the loss. unbiased-loss: k3 times the probability ratio, whose gradient is that of the KL
    (DeepSeek-V3.2). docs/algorithms.md says which of them have the gradient of the KL."""
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
    """Reward subtracted from a truncated response (truncated: penalise); largest penalty of overlong_fraction."""
    overlong_fraction: Fraction = 0.0
    """Share of rollout.max_new_tokens (with an environment, of the most tokens of all turns), at its end, in which a
    response is penalised: linearly, up to truncation_penalty (soft overlong punishment, Yu 2025, DAPO, eq. 13). 0: off.
    """
    filter_rounds: NonNegative | None = None
    """Leave out prompts whose samples all have the same reward (dynamic sampling, Yu 2025, DAPO), and sample up to this
    many further batches of prompts until rl.prompts_per_step are left. Null: learn from all prompts."""
    importance_cap: PositiveNumber | None = None
    """Highest importance weight between learner and engine, which corrects for their mismatch and for staleness. Null:
    no weights. Required if rl.max_staleness > 0, unless there is a gate."""
    importance_floor: PositiveNumber | None = None
    """Lowest importance weight. Null: none."""
    importance_mode: Literal["truncate", "mask"] = "truncate"
    """Treatment of weights outside of importance_floor and importance_cap. truncate: set to the bound (TIS); mask: set
    to 0 (IcePop)."""
    importance_level: Literal["token", "sequence"] = "token"
    """Whether the weight is that of a token, or the product over the tokens of its sample."""
    gate: Literal["ratio", "k2", "k3", "binary-kl", "tv"] | None = None
    """Tokens or samples whose divergence between learner and engine is outside of gate_min and gate_max are not learned
    from. ratio: p_learner / p_engine; k2, k3: Schulman 2020; binary-kl, tv: of sampling this token or another one.
    Null: no gate."""
    gate_over: Literal["token", "seq-mean", "seq-sum", "seq-max"] = "token"
    """What the gate opens for: one token, or a sample by the mean, sum or maximum over its tokens (of the ratio: by
    geometric mean or product)."""
    gate_min: PositiveNumber | None = None
    """Lower bound of the gate; of ratios only. Null: none."""
    gate_max: PositiveNumber | None = None
    """Upper bound of the gate. Required with a gate."""

    @property
    def reward_parts(self) -> tuple[str, ...]:
        """Names of the parts of the reward that advantages are computed from; empty: from the reward."""
        return ()

    @property
    def kl_in_reward(self) -> bool:
        """Whether -kl_coefficient times the estimate of KL(old || reference) is added to each token's reward."""
        return self.kl_estimator.endswith("-reward")

    @property
    def whitens(self) -> bool:
        """Whether advantages are whitened over the whole step before they enter the loss."""
        return False

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
        yield from self._corrections_that_contradict()
        if self.filter_rounds is not None and not (self.compares_samples and not self.greedy_samples):
            yield (
                f"algorithm.filter_rounds needs an algorithm that compares the samples of a prompt, such as grpo or "
                f"dapo; algorithm.name='{self.name}' does not. Set algorithm.filter_rounds=null."
            )
        if self.adaptive_kl_target is not None and not self.kl_coefficient:
            yield (
                f"algorithm.adaptive_kl_target={self.adaptive_kl_target:g} multiplies algorithm.kl_coefficient, which "
                "is 0 and stays 0. Set algorithm.kl_coefficient=0.05, or algorithm.adaptive_kl_target=null."
            )
        if rl.max_staleness and self.importance_cap is None and self.gate is None:
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

    def _corrections_that_contradict(self) -> Iterator[str]:
        """Messages about keys of the importance weights and of the gate."""
        floor, cap = self.importance_floor, self.importance_cap
        if floor is not None and (cap is None or floor >= cap):
            yield (
                f"algorithm.importance_floor={floor:g} needs a higher algorithm.importance_cap, got {cap}. Set "
                f"algorithm.importance_cap={10.0 * floor:g}, or remove importance_floor."
            )
        idle = changed_key(self, "importance_mode", "importance_level")
        if cap is None and idle:
            yield (
                f"algorithm.{idle}={getattr(self, idle)} needs algorithm.importance_cap: without it there are no "
                f"importance weights. Set algorithm.importance_cap=2, or remove {idle}."
            )
        idle = changed_key(self, "gate_max", "gate_min", "gate_over")
        if self.gate is None and idle:
            yield (
                f"algorithm.{idle}={getattr(self, idle)} needs algorithm.gate, which is null: nothing would be gated. "
                f"Set algorithm.gate=ratio, or remove {idle}."
            )
        if self.gate is None:
            return
        if self.gate_max is None:
            usual = 5.0 if self.gate == "ratio" else 0.1
            yield f"algorithm.gate={self.gate} needs algorithm.gate_max. Set it, for example to {usual:g}."
        elif self.gate_min is not None and self.gate_min >= self.gate_max:
            yield (
                f"algorithm.gate_min={self.gate_min:g} is not below algorithm.gate_max={self.gate_max:g}: nothing "
                "would be learned. Change either."
            )
        if self.gate != "ratio" and self.gate_min is not None:
            yield (
                f"algorithm.gate_min bounds ratios, and algorithm.gate={self.gate} is 0 where learner and engine "
                "agree. Remove gate_min, or set algorithm.gate=ratio."
            )
        if self.gate == "ratio" and self.gate_over == "seq-max":
            yield (
                "algorithm.gate_over=seq-max needs a divergence that has no sign. Set algorithm.gate=k3, or "
                "algorithm.gate_over=seq-mean."
            )

    def _groups_that_contradict(self, rl: RlConfig, rollout: RolloutConfig) -> Iterator[str]:
        """Messages about keys that would separate samples which must be compared."""
        name, shard = f"algorithm.name='{self.name}'", rollout.shard_size
        size = rl.samples_per_prompt + self.greedy_samples
        if size < 2:
            yield (
                f"{name} compares the samples of a prompt and needs at least two, got "
                f"rl.samples_per_prompt={size}. Set rl.samples_per_prompt=4, or algorithm.name=ppo."
            )
        if rollout.reproducible and shard % size:
            yield (
                f"rollout.samples_per_shard={shard} would split the {size} samples of a prompt, which {name} compares"
                f"{' (one of them greedy)' if self.greedy_samples else ''}. "
                f"Set it to {max(shard // size, 1) * size}."
            )
        if rl.prompts_per_step % self.minibatches:
            yield (
                f"rl.prompts_per_step={rl.prompts_per_step} is not divisible by "
                f"algorithm.minibatches={self.minibatches}; with {name} the samples of a prompt must stay in one "
                "minibatch. Change either."
            )
