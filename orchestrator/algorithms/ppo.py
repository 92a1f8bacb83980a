"""PPO (Schulman 2017): generalised advantage estimation with a critic."""

from __future__ import annotations

from typing import ClassVar, Literal

from orchestrator.algorithms.algorithm import Algorithm
from orchestrator.config.base import Fraction, PositiveNumber


class Ppo(Algorithm):
    """PPO with a critic and generalised advantage estimation."""

    needs_critic: ClassVar[bool] = True

    name: Literal["ppo"] = "ppo"
    gamma: Fraction = 1.0
    """Discount."""
    lam: Fraction = 0.95
    """GAE lambda."""
    whiten_advantages: bool = True
    """Whiten advantages over the whole batch."""
    clip_value: PositiveNumber | None = 0.2
    """Value clip range. Null: off."""
