"""Learning a policy from preferences, without a reward model (DPO and its kin); rows are those of reward models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from actors.learning.distributed import Group, all_or_none, on_rank_0
from actors.learning.learner import Learner, Loss, Update
from actors.learning.objectives.losses import LossTerms
from actors.learning.objectives.preference import (
    PREFERENCE_OBJECTIVES,
    BatchNumbers,
    Replies,
    kto_kl,
    mismatched,
    replies_of,
)
from actors.learning.packing import MicroBatch, TokenRows
from actors.learning.sharing import can_share
from actors.training.artifact import make_artifact
from actors.training.language_model import PolicyTraining
from actors.training.ranked_rows import Mismatched, RankedRows, stored_rankings
from actors.training.row_values import row_values
from orchestrator.config.losses import Orpo
from orchestrator.config.trainings import PreferenceConfig
from orchestrator.run.storage import reading, replacing

REFERENCE_FILE = "reference.npy"

PreferenceData = tuple[Path, Path, Path | None]
"""Folders (ranked_tokens.py) of the rows to train on, of held-out ones, and of mismatched ones if the loss needs them:
the pairs of Mismatched."""


@dataclass(frozen=True)
class PreferenceTraining(PolicyTraining):
    """`seed` decides the batches, too: KTO's baseline is estimated from the replies of a batch."""

    stage: PreferenceConfig


def learns_prompts(stage: PreferenceConfig) -> bool:
    """Whether prompts of the best replies are learned, too."""
    return isinstance(stage.loss, Orpo) and stage.loss.nll_of_prompt


@dataclass(frozen=True)
class Preferred:
    """What training found. `held_out_rewards` holds, per record, the implicit rewards of its replies, best first."""

    held_out_rewards: Sequence[Sequence[float]]


class PreferenceTask:
    """One rank of the training; a Task (task.py). Complete when constructed.

    The reference is the policy before training. Its log-probs are computed before the first step and kept in the work
    folder, for tries that follow a lost one.

    Raises:
        DataError: on all ranks, when one of them can't load the model.
    """

    def __init__(self, settings: PreferenceTraining, data: PreferenceData, group: Group) -> None:
        self.settings, self.group = settings, group
        stage, steps = settings.stage, settings.total_optimizer_steps
        self.chat, model = all_or_none(settings.load, group)
        self._shares_prompts = can_share(model.pretrained)
        added = ["reply"] if learns_prompts(stage) else []
        train = stored_rankings(data[0], shares_prompts=self._shares_prompts, tokens_added=added)
        held_out = stored_rankings(data[1], shares_prompts=self._shares_prompts)
        self.learner = Learner(
            model,
            stage.learner(steps),
            dtype=settings.policy.compute_dtype,
            total_optimizer_steps=steps,
            seed=settings.seed,
        )
        mixed = [] if data[2] is None else [stored_rankings(data[2])]
        self._pairs = Mismatched(train.num_records if mixed else 0, stage, settings.seed)
        if stage.loss.needs_reference:
            train, held_out, *mixed = self._with_reference([train, held_out, *mixed])
        self.data, self._held_out, self._mixed = train, held_out, mixed

    def objective(self, records: Sequence[int]) -> Loss:
        """Collective: for KTO, the policy's log-probs of mismatched replies are computed first."""
        best = [self.data.first_row[record] for record in records]
        tokens = max(int(self.data.rows.learned_lengths[best].sum()), 1)
        return partial(self._terms, BatchNumbers(len(records) / tokens, self._kl(records)))

    def count(self, records: Sequence[int]) -> float:
        return float(len(records))

    def metrics(self, update: Update) -> Mapping[str, float]:
        means = update.means
        return {
            "loss": means["loss"],
            "accuracy": means["correct"] / means["compared"],
            "margin": means["margin"] / means["compared"],
            "grad_norm": update.grad_norm,
            "learning_rate": update.learning_rate,
        }

    def finish(self) -> Preferred:
        """Measures the implicit rewards of held-out replies, and writes the finished policy."""
        held_out, settings = self._held_out, self.settings
        found = self._values(held_out.rows, lambda output, micro: self._rewards(replies_of(output[0], micro)))
        make_artifact(self.learner, self.chat, settings.folder, settings.work, self.group, self.chat.save_stops)
        return Preferred(held_out.by_record(found.tolist()))

    def _rewards(self, replies: Replies) -> torch.Tensor:
        loss = self.settings.stage.loss
        return PREFERENCE_OBJECTIVES[loss.name].reward(loss, replies)

    def _terms(self, numbers: BatchNumbers, output: tuple[torch.Tensor, torch.Tensor], micro: MicroBatch) -> LossTerms:
        loss, replies = self.settings.stage.loss, replies_of(output[0], micro)
        return PREFERENCE_OBJECTIVES[loss.name].terms(loss, self._rewards(replies), replies, numbers)

    def _kl(self, records: Sequence[int]) -> float:
        """KTO's baseline for one batch; 0 for other losses."""
        if not self._mixed:
            return 0.0
        mixed = self._mixed[0].rows.take(self._pairs.rows_of(mismatched(records)))
        logprobs = torch.tensor(self._values(mixed, _logprobs), dtype=torch.float64)
        return float(kto_kl(logprobs, torch.tensor(mixed.row_column("reference"), dtype=torch.float64)))

    def _with_reference(self, parts: Sequence[RankedRows]) -> list[RankedRows]:
        """Reads the reference's log-probs from the work folder, or computes them and keeps them there."""
        file = self.settings.work / REFERENCE_FILE
        found = on_rank_0(lambda: _read(file), self.group)
        if found is None:
            found = np.concatenate([self._values(part.rows, _logprobs) for part in parts]).astype(np.float32)
            on_rank_0(lambda: _write(file, found), self.group)
        ends = np.cumsum([part.rows.num_rows for part in parts])
        return [part.with_reference(its) for part, its in zip(parts, np.split(found, ends[:-1]), strict=True)]

    def _values(self, rows: TokenRows, values: Callable[[Any, MicroBatch], torch.Tensor]) -> npt.NDArray[np.float64]:
        budget = self.settings.stage.micro_batch_tokens
        return row_values(
            rows,
            self.learner,
            self.group,
            micro_batch_tokens=budget,
            shares_prompts=self._shares_prompts,
            values=values,
        )


def _logprobs(output: tuple[torch.Tensor, torch.Tensor], micro: MicroBatch) -> torch.Tensor:
    return replies_of(output[0], micro).logprob_B


def _read(file: Path) -> npt.NDArray[np.float32] | None:
    if not file.exists():
        return None
    with reading(file):
        found: npt.NDArray[np.float32] = np.load(file, allow_pickle=False)
    return found


def _write(file: Path, logprobs: npt.NDArray[np.float32]) -> None:
    with replacing(file) as temporary, temporary.open("wb") as stream:
        np.save(stream, logprobs)
