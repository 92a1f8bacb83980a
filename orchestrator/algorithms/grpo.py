"""GRPO (Shao 2024, DeepSeekMath): the samples of a prompt are compared with each other; no critic."""

from __future__ import annotations

from typing import ClassVar, Literal

from orchestrator.algorithms.algorithm import Algorithm


class Grpo(Algorithm):
    """No critic: a response's return minus the mean of its prompt's responses, over their standard deviation."""

    compares_samples: ClassVar[bool] = True

    name: Literal["grpo"] = "grpo"
