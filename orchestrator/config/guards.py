"""Limits on metrics, and the actions taken when a step exceeds them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from orchestrator.config.base import PositiveNumber, Section
from orchestrator.config.rewards import RewardConfig
from orchestrator.config.sections import RlConfig, RolloutConfig

GuardAction = Literal["warn", "pause", "stop"]


class GuardConfig(Section):
    action: GuardAction = "stop"
    """warn: write an event and a line; pause: wait until the file PAUSED in the run folder is deleted; stop: exit 3."""


class KlGuardConfig(GuardConfig):
    max: PositiveNumber | None = None
    """Highest KL per response (kl/per_response, nats). Null: off."""


class EntropyGuardConfig(GuardConfig):
    min: PositiveNumber | None = None
    """Lowest entropy of the policy (policy/entropy, nats) in steps in which it learns. Null: off."""


class LengthGuardConfig(GuardConfig):
    min: PositiveNumber | None = None
    """Lowest mean response length (response/length_mean, tokens). Null: off."""
    max: PositiveNumber | None = None
    """Highest mean response length; below rollout.max_new_tokens. Null: off."""


class RewardJumpGuardConfig(GuardConfig):
    max: PositiveNumber | None = None
    """Largest distance of reward/mean from its median over the last `window` steps, in standard deviations of those
    steps. Null: off."""
    window: Annotated[int, Field(ge=3)] = 10
    """Number of earlier steps to compare with. The guard is inactive until there are so many."""


class MismatchGuardConfig(GuardConfig):
    max: PositiveNumber | None = None
    """Highest mean |log-prob of the learner - log-prob of the engine| (engine/mismatch, nats). Null: off."""


class FailedRewardsGuardConfig(Section):
    action: Literal["warn", "pause"] = "warn"
    """As above. The run always stops above reward.max_failed_fraction, before the step is committed."""
    max: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Highest share of failed rewards (reward/failed_fraction); below reward.max_failed_fraction. Null: off."""


class GuardsConfig(Section):
    kl: KlGuardConfig = KlGuardConfig()
    entropy: EntropyGuardConfig = EntropyGuardConfig()
    length: LengthGuardConfig = LengthGuardConfig()
    reward_jump: RewardJumpGuardConfig = RewardJumpGuardConfig()
    mismatch: MismatchGuardConfig = MismatchGuardConfig()
    failed_rewards: FailedRewardsGuardConfig = FailedRewardsGuardConfig()

    def contradictions(
        self, rl: RlConfig, rollout: RolloutConfig, reward: RewardConfig, turns: int = 1
    ) -> Iterator[str]:
        """Bounds that every step violates, or that no step can violate. `turns`: the most turns of a response."""
        length, longest = self.length, rollout.max_new_tokens * turns
        limit = f"rollout.max_new_tokens={rollout.max_new_tokens}" + (f" in {turns} turns" if turns > 1 else "")
        if length.min is not None and length.min > (length.max or longest):
            above = f"guards.length.max={length.max:g}" if length.max else limit
            yield f"guards.length.min={length.min:g} is above {above}: every step would violate it. Lower it."
        if length.max is not None and length.max >= longest:
            yield (
                f"guards.length.max={length.max:g} can never trip: no response is longer than "
                f"{limit}. Lower it or remove it."
            )
        jump = self.reward_jump
        if jump.max is not None and jump.window >= rl.steps:
            yield (
                f"guards.reward_jump.window={jump.window} is never full with rl.steps={rl.steps}. Set a smaller "
                "window or remove guards.reward_jump.max."
            )
        failed = self.failed_rewards.max
        if failed is not None and failed >= reward.max_failed_fraction:
            yield (
                f"guards.failed_rewards.max={failed:g} can never trip: the run stops above "
                f"reward.max_failed_fraction={reward.max_failed_fraction:g}. Lower the first or raise the second."
            )
