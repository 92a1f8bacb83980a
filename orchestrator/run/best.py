"""Selects the best checkpoint by evaluation: a pure function of the evaluation files.

A run that was killed and continued therefore selects the same checkpoint as an uninterrupted run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import StorageError
from orchestrator.evaluation import evaluation_file, evaluation_metrics, read_evaluation

BEST_FILE = "best.json"
KL = "evaluation/kl_per_response"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Best:
    """The content of checkpoints/best.json. `step` is the checkpoint's step and the version of the weights."""

    step: int
    metric: str
    value: float
    kl_per_response: float

    def __str__(self) -> str:
        return f"version {self.step}, {self.metric} {self.value:.3f} at {self.kl_per_response:.2f} nats of KL"


@dataclass(frozen=True)
class BestByEvaluation:
    """Selects among evaluated versions.

    Args:
        folder: folder of the evaluation files.
        metric: name of an evaluation metric; higher is better.
        max_kl: versions above this KL per held-out response are excluded. None: no bound.
    """

    folder: Path
    metric: str
    max_kl: float | None = None

    def among(self, steps: Iterable[int]) -> Best | None:
        """The best version; on ties the earliest. None: no version was evaluated and is within the bound."""
        best: Best | None = None
        for step in sorted(steps):
            found = self._of(step)
            if found is not None and (best is None or found.value > best.value):
                best = found
        return best

    def _of(self, step: int) -> Best | None:
        path = evaluation_file(self.folder, step)
        if not path.exists():
            return None
        try:
            metrics = evaluation_metrics(read_evaluation(path))
        except StorageError as error:
            _log.warning("%s Version %d can't be the best one.", error, step)
            return None
        value, kl = metrics.get(self.metric, math.nan), metrics.get(KL, math.nan)
        is_within = self.max_kl is None or kl <= self.max_kl
        return Best(step, self.metric, value, kl) if math.isfinite(value) and is_within else None
