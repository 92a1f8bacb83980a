"""Learning-rate curves, counted in optimizer steps."""

from __future__ import annotations

import math


def learning_rate(
    optimizer_step: int, *, peak: float, schedule: str, warmup_optimizer_steps: int, total_optimizer_steps: int
) -> float:
    """Learning rate of optimizer step `optimizer_step` (from 0).

    Warm-up rises linearly and reaches `peak` at step `warmup_optimizer_steps`; "linear" and "cosine" then fall so
    that the step after the last one would be at 0. Steps beyond the total stay at the end point.
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
