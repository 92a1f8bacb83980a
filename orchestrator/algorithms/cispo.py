"""CISPO (MiniMax 2025, MiniMax-M1): clips the importance weight of a token instead of its update."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from orchestrator.algorithms.grpo import GroupRelative
from orchestrator.config.base import NonNegativeNumber, PositiveNumber


class Cispo(GroupRelative):
    """GRPO's advantages; the gradient of a token's log-prob is weighted with its clipped ratio, so that clipped tokens
    are learned from too (MiniMax 2025, eqs. 4 and 5). clip_ratio=1 is no lower bound. The paper has no KL penalty."""

    name: Literal["cispo"] = "cispo"
    clip_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    clip_ratio_high: PositiveNumber | None = 4.0
    kl_coefficient: NonNegativeNumber = 0.0
