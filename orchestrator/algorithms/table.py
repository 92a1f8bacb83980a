"""The table of algorithms. The torch half of each has the same name in actors/learning/objectives/table.py."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.algorithms.algorithm import Algorithm
from orchestrator.algorithms.cispo import Cispo
from orchestrator.algorithms.gdpo import Gdpo
from orchestrator.algorithms.grpo import Dapo, DrGrpo, Grpo
from orchestrator.algorithms.gspo import Gspo
from orchestrator.algorithms.ppo import Ppo
from orchestrator.algorithms.reinforce import ReinforcePlusPlus, ReinforcePlusPlusBaseline
from orchestrator.algorithms.remax import Remax
from orchestrator.algorithms.rloo import Rloo

ALGORITHMS: Mapping[str, type[Algorithm]] = {
    "ppo": Ppo,
    "grpo": Grpo,
    "dr-grpo": DrGrpo,
    "dapo": Dapo,
    "gdpo": Gdpo,
    "gspo": Gspo,
    "cispo": Cispo,
    "rloo": Rloo,
    "reinforce++": ReinforcePlusPlus,
    "reinforce++-baseline": ReinforcePlusPlusBaseline,
    "remax": Remax,
}
