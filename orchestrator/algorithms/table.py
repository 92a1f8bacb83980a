"""The table of algorithms. The torch half of each has the same name in actors/learning/objectives/table.py."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.algorithms.algorithm import Algorithm
from orchestrator.algorithms.grpo import Grpo
from orchestrator.algorithms.ppo import Ppo
from orchestrator.algorithms.rloo import Rloo

ALGORITHMS: Mapping[str, type[Algorithm]] = {"ppo": Ppo, "grpo": Grpo, "rloo": Rloo}
