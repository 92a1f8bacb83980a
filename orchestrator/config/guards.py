"""Limits on metrics, and what happens when a step is outside them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from orchestrator.config.base import Section

GuardAction = Literal["warn", "pause", "stop"]


class GuardConfig(Section):
    action: GuardAction = "stop"
    """warn: an event and a line; pause: wait until the file PAUSED in the run folder is deleted; stop: exit code 3."""


class KlGuardConfig(GuardConfig):
    max: Annotated[float, Field(gt=0)] | None = None
    """Highest KL per response (kl/per_response, nats). Null: off."""


class EntropyGuardConfig(GuardConfig):
    min: Annotated[float, Field(gt=0)] | None = None
    """Lowest entropy of the policy (policy/entropy, nats), in steps in which it learns. Null: off."""


class LengthGuardConfig(GuardConfig):
    min: Annotated[float, Field(gt=0)] | None = None
    """Lowest mean response length (response/length_mean, tokens). Null: off."""
    max: Annotated[float, Field(gt=0)] | None = None
    """Highest mean response length; below rollout.max_new_tokens. Null: off."""


class RewardJumpGuardConfig(GuardConfig):
    max: Annotated[float, Field(gt=0)] | None = None
    """Largest distance of reward/mean from its median over the last `window` steps, in their standard deviations. Null:
    off."""
    window: Annotated[int, Field(ge=3)] = 10
    """Steps to compare with; a step with fewer before it passes."""


class MismatchGuardConfig(GuardConfig):
    max: Annotated[float, Field(gt=0)] | None = None
    """Highest mean |log-prob of the learner - log-prob of the engine| (engine/mismatch, nats). Null: off."""


class FailedRewardsGuardConfig(Section):
    action: Literal["warn", "pause"] = "warn"
    """As above. Above reward.max_failed_fraction the run stops in any case, before the step is committed."""
    max: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Highest share of failed rewards (reward/failed_fraction); below reward.max_failed_fraction. Null: off."""


class GuardsConfig(Section):
    kl: KlGuardConfig = KlGuardConfig()
    entropy: EntropyGuardConfig = EntropyGuardConfig()
    length: LengthGuardConfig = LengthGuardConfig()
    reward_jump: RewardJumpGuardConfig = RewardJumpGuardConfig()
    mismatch: MismatchGuardConfig = MismatchGuardConfig()
    failed_rewards: FailedRewardsGuardConfig = FailedRewardsGuardConfig()
