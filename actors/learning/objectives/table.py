"""The table of objectives: the torch halves of the algorithms in orchestrator/algorithms/table.py, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from actors.learning.objectives.cispo import CispoObjective
from actors.learning.objectives.clipped import ClippedObjective
from actors.learning.objectives.gspo import GspoObjective
from actors.learning.objectives.objective import Objective
from actors.learning.objectives.ppo import PpoObjective
from orchestrator.algorithms.algorithm import Algorithm

OBJECTIVES: Mapping[str, Callable[[Any], Objective]] = {
    "ppo": PpoObjective,
    "grpo": ClippedObjective,
    "dr-grpo": ClippedObjective,
    "dapo": ClippedObjective,
    "gdpo": ClippedObjective,
    "gspo": GspoObjective,
    "cispo": CispoObjective,
    "rloo": ClippedObjective,
    "reinforce++": ClippedObjective,
    "reinforce++-baseline": ClippedObjective,
    "remax": ClippedObjective,
}


def objective_of(algorithm: Algorithm) -> Objective:
    return OBJECTIVES[algorithm.name](algorithm)
