"""GSPO (Zheng 2025): GRPO's advantages with one probability ratio for a whole response."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from orchestrator.algorithms.algorithm import Aggregation
from orchestrator.algorithms.grpo import GroupRelative
from orchestrator.config.base import PositiveNumber


class Gspo(GroupRelative):
    """GRPO with the ratio of the whole response, s = (p_new / p_old)^(1/length), which is clipped in a much smaller
    range (Zheng 2025, eqs. 5 to 7 and section 5.1)."""

    name: Literal["gspo"] = "gspo"
    clip_ratio: Annotated[float, Field(gt=0, lt=1)] = 3e-4
    clip_ratio_high: PositiveNumber | None = 4e-4
    aggregation: Aggregation = "sample"
