"""CISPO (MiniMax 2025, MiniMax-M1): clips the importance weight of a token instead of its update."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from orchestrator.algorithms.grpo import GroupRelative
from orchestrator.config.base import NonNegativeNumber, PositiveNumber
from orchestrator.config.sections import RlConfig, RolloutConfig


class Cispo(GroupRelative):
    """GRPO's advantages; the gradient of a token's log-prob is weighted with its clipped ratio, so that clipped tokens
    are learned from too (MiniMax 2025, eqs. 4 and 5). clip_ratio=1 is no lower bound. The paper has no KL penalty."""

    name: Literal["cispo"] = "cispo"
    clip_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    clip_ratio_high: PositiveNumber | None = 4.0
    kl_coefficient: NonNegativeNumber = 0.0

    def contradictions(self, rl: RlConfig, rollout: RolloutConfig) -> Iterator[str]:
        yield from super().contradictions(rl, rollout)
        if self.dual_clip is not None:
            yield (
                f"algorithm.dual_clip={self.dual_clip:g} bounds a ratio that algorithm.name='cispo' clips whatever the "
                "sign of the advantage. Set algorithm.clip_ratio_high instead, and algorithm.dual_clip=null."
            )
