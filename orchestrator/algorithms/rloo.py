"""RLOO (Ahmadian 2024): REINFORCE with the mean of a prompt's other samples as the baseline; no critic."""

from __future__ import annotations

from typing import ClassVar, Literal

from orchestrator.algorithms.algorithm import Algorithm


class Rloo(Algorithm):
    """No critic: a response's return minus the mean return of its prompt's other responses."""

    compares_samples: ClassVar[bool] = True

    name: Literal["rloo"] = "rloo"
