"""Supervised fine-tuning: the negative log-likelihood of marked tokens (Ouyang 2022, section 3.5)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from actors.learning.distributed import Group, all_or_none
from actors.learning.documents import can_pack
from actors.learning.learner import Learner, Loss, Update
from actors.learning.objectives.losses import LossTerms, likelihood_loss
from actors.learning.packing import MicroBatch, row_sums
from actors.training.artifact import make_artifact
from actors.training.language_model import LearnedRows, PolicyTraining
from actors.training.neftune import EmbeddingNoise
from actors.training.row_values import row_values
from actors.training.stored_rows import StoredRows
from orchestrator.config.trainings import SftConfig

SftData = tuple[Path, Path]
"""Folders of the rows to train on and of held-out ones (stored_rows.py)."""


@dataclass(frozen=True)
class SftTraining(PolicyTraining):
    """Inputs of SftTask. `seed` decides the noise, too."""

    stage: SftConfig


@dataclass(frozen=True)
class Fitted:
    """What training found: the mean negative log-likelihood of a held-out token, in nats. None: nothing is held out."""

    held_out_loss: float | None


class SftTask:
    """One rank of supervised fine-tuning; a Task (task.py). Complete when constructed.

    Raises:
        DataError: on all ranks, when one of them can't load the model.
    """

    def __init__(self, settings: SftTraining, data: SftData, group: Group) -> None:
        self.settings, self.group = settings, group
        self.chat, model = all_or_none(settings.load, group)
        packs = can_pack(model.pretrained)
        self.data, self._held_out = (LearnedRows(StoredRows(folder, is_packed=packs)) for folder in data)
        stage, steps = settings.stage, settings.total_optimizer_steps
        self.learner = Learner(
            model,
            stage.learner(steps),
            dtype=settings.policy.compute_dtype,
            total_optimizer_steps=steps,
            seed=settings.seed,
        )
        alpha = stage.neftune_alpha
        self._noise = EmbeddingNoise(model, alpha=alpha, seed=settings.seed) if alpha else None

    def objective(self, records: Sequence[int]) -> Loss:
        if self._noise is not None:
            self._noise.begin_batch(records)
        return _loss

    def count(self, records: Sequence[int]) -> float:
        return self.data.num_learned(records)

    def metrics(self, update: Update) -> Mapping[str, float]:
        loss = update.means["loss"]
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "grad_norm": update.grad_norm,
            "learning_rate": update.learning_rate,
        }

    def finish(self) -> Fitted:
        """Measures the loss on held-out rows, and writes the finished policy."""
        found = Fitted(self._held_out_loss())
        settings = self.settings
        make_artifact(self.learner, self.chat, settings.folder, settings.work, self.group, self.chat.save_stops)
        return found

    def _held_out_loss(self) -> float | None:
        held_out = self._held_out
        if not held_out.num_records:
            return None
        logprobs = row_values(
            held_out.rows,
            self.learner,
            self.group,
            micro_batch_tokens=self.settings.stage.micro_batch_tokens,
            values=lambda output, micro: row_sums(output[0].double(), micro.lengths_B),
        )
        total = sum(logprobs.tolist())
        return -total / held_out.num_learned(range(held_out.num_records))


def _loss(output: tuple[torch.Tensor, torch.Tensor], micro: MicroBatch) -> LossTerms:
    return likelihood_loss(output[0])
