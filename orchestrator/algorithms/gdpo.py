"""GDPO (Liu 2026, arXiv 2601.05242): each part of the reward is compared on its own; no critic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from orchestrator.algorithms.advantages import Advantages, Doubles, Groups, Responses, group_means, per_response
from orchestrator.algorithms.algorithm import KlEstimator
from orchestrator.algorithms.grpo import GroupRelative, grpo
from orchestrator.config.sections import RlConfig, RolloutConfig


class Gdpo(GroupRelative):
    """GRPO's advantages of each part of the reward, Σ_k w_k (r_k - mean) / std over the prompt's responses, whitened
    over the whole step (Liu 2026, section 3.1): a part on a large scale does not drown the others. What
    truncation_penalty and overlong_fraction subtract is one more part, with weight 1. The KL is in the loss."""

    name: Literal["gdpo"] = "gdpo"
    part_weights: Mapping[str, float] = {}
    """Weight of each part of the reward (reward/part/NAME), such as {formatted_answer.answer: 1}. Other parts are left
    out."""
    kl_estimator: KlEstimator = "k3-loss"

    @property
    def whitens(self) -> bool:
        return True

    @property
    def reward_parts(self) -> tuple[str, ...]:
        return tuple(self.part_weights)

    def advantages(self, responses: Responses) -> Advantages:
        def compare(returns_R: Doubles, group_R: Groups) -> tuple[Doubles, Doubles]:
            total_R = grpo(responses.shaping_R, group_R, divide_by_std=self.divide_by_std)[0]
            for name, weight in self.part_weights.items():
                total_R = total_R + weight * grpo(responses.parts[name], group_R, divide_by_std=self.divide_by_std)[0]
            return total_R, group_means(returns_R, group_R)[1]

        return per_response(responses, compare)

    def contradictions(self, rl: RlConfig, rollout: RolloutConfig) -> Iterator[str]:
        yield from super().contradictions(rl, rollout)
        if not self.part_weights:
            yield (
                "algorithm.name='gdpo' compares parts of the reward and needs their names: set "
                "algorithm.part_weights, such as {formatted_answer.answer: 1}, or algorithm.name=grpo."
            )
        if self.kl_in_reward:
            yield (
                f"algorithm.kl_estimator={self.kl_estimator} puts the KL into the reward, of which "
                "algorithm.name='gdpo' reads only the named parts. Set algorithm.kl_estimator=k3-loss."
            )
