"""Learning-rate schedules over optimizer steps."""

from __future__ import annotations

import math


def learning_rate(
    optimizer_step: int, *, peak: float, schedule: str, warmup_optimizer_steps: int, total_optimizer_steps: int
) -> float:
    """Learning rate of optimizer step `optimizer_step` (from 0).

    Linear warm-up reaches `peak` at step `warmup_optimizer_steps`. "linear" and "cosine" then decay to 0 at step
    `total_optimizer_steps` and stay there.
    """
    if optimizer_step < warmup_optimizer_steps:
        return peak * (optimizer_step + 1) / (warmup_optimizer_steps + 1)
    if schedule == "constant":
        return peak
    span = max(total_optimizer_steps - warmup_optimizer_steps, 1)
    progress = min((optimizer_step - warmup_optimizer_steps) / span, 1.0)
    if schedule == "linear":
        return peak * (1.0 - progress)
    if schedule == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
    raise ValueError(f"schedule must be constant, linear or cosine, got {schedule!r}")
