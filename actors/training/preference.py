"""Learning a policy from preferences, without a reward model (DPO and its kin); rows are those of reward models."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
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
from actors.training.ranked_rows import JudgedRecord, RankedRows, mismatched_rows, ranked_rows
from actors.training.row_values import row_values
from actors.training.trainer import training_batches
from orchestrator.config.losses import Orpo
from orchestrator.config.trainings import PreferenceConfig
from orchestrator.run.storage import reading, replacing

REFERENCE_FILE = "reference.npy"

JudgedData = tuple[Sequence[JudgedRecord], Sequence[JudgedRecord]]
"""Records to train on, and held-out ones."""


@dataclass(frozen=True)
class PreferenceTraining(PolicyTraining):
    """`seed` decides the batches, too: KTO's baseline is estimated from the replies of a batch."""

    stage: PreferenceConfig


@dataclass(frozen=True)
class Preferred:
    """What training found. `held_out_rewards` holds, per record, the implicit rewards of its replies, best first."""

    held_out_rewards: Sequence[Sequence[float]]
    num_truncated: int


class PreferenceTask:
    """One rank of the training; a Task (task.py). Complete when constructed.

    The reference is the policy before training. Its log-probs are computed before the first step and kept in the work
    folder, for tries that follow a lost one.

    Raises:
        DataError: on all ranks, when one of them can't load the model or tokenise the preferences.
    """

    def __init__(self, settings: PreferenceTraining, data: JudgedData, group: Group) -> None:
        self.settings, self.group = settings, group
        stage, steps = settings.stage, settings.total_optimizer_steps

        def load() -> tuple[Any, Any, list[RankedRows]]:
            chat, model = settings.load()
            rows = [ranked_rows(part, chat, max_length=stage.max_length) for part in data]
            shares = can_share(model.pretrained)
            return chat, model, [replace(part, shares_prompts=shares) for part in rows]

        self.chat, model, (train, held_out) = all_or_none(load, group)
        self.learner = Learner(
            model,
            stage.learner(steps),
            dtype=settings.policy.compute_dtype,
            total_optimizer_steps=steps,
            seed=settings.seed,
        )
        self._shares_prompts = train.shares_prompts
        batches = training_batches(train.num_records, stage, settings.seed) if stage.loss.judgement == "labels" else ()
        pairs = dict.fromkeys(pair for _, _, batch in batches for pair in mismatched(batch))
        self._mismatched_row = {pair: row for row, pair in enumerate(pairs)}
        mixed = mismatched_rows(train, list(pairs), max_length=stage.max_length)
        if stage.loss.needs_reference:
            train, held_out, mixed = self._with_reference([train, held_out, mixed])
        if isinstance(stage.loss, Orpo) and stage.loss.nll_of_prompt:
            train = train.with_prompts_learned()
        self.data, self._held_out, self._mismatched = train, held_out, mixed

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
        return Preferred(held_out.by_record(found), self.data.num_truncated + held_out.num_truncated)

    def _rewards(self, replies: Replies) -> torch.Tensor:
        loss = self.settings.stage.loss
        return PREFERENCE_OBJECTIVES[loss.name].reward(loss, replies)

    def _terms(self, numbers: BatchNumbers, output: tuple[torch.Tensor, torch.Tensor], micro: MicroBatch) -> LossTerms:
        loss, replies = self.settings.stage.loss, replies_of(output[0], micro)
        return PREFERENCE_OBJECTIVES[loss.name].terms(loss, self._rewards(replies), replies, numbers)

    def _kl(self, records: Sequence[int]) -> float:
        """KTO's baseline for one batch; 0 for other losses."""
        if self.settings.stage.loss.judgement != "labels":
            return 0.0
        mixed = self._mismatched.of_rows([self._mismatched_row[pair] for pair in mismatched(records)])
        logprobs = torch.tensor(self._values(mixed.rows, _logprobs), dtype=torch.float64)
        return float(kto_kl(logprobs, torch.tensor(mixed.table["reference"].to_pylist(), dtype=torch.float64)))

    def _with_reference(self, parts: Sequence[RankedRows]) -> list[RankedRows]:
        """Reads the reference's log-probs from the work folder, or computes them and keeps them there."""
        file = self.settings.work / REFERENCE_FILE
        found = on_rank_0(lambda: _read(file), self.group)
        if found is None:
            computed = [self._values(part.rows, _logprobs) for part in parts]
            found = list(itertools.chain.from_iterable(computed))
            on_rank_0(lambda: _write(file, found), self.group)
        logprobs = iter(found)
        return [part.with_reference(list(itertools.islice(logprobs, part.table.num_rows))) for part in parts]

    def _values(self, rows: TokenRows, values: Callable[[Any, MicroBatch], torch.Tensor]) -> list[float]:
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


def _read(file: Path) -> list[float] | None:
    if not file.exists():
        return None
    with reading(file):
        found: list[float] = np.load(file, allow_pickle=False).tolist()
    return found


def _write(file: Path, logprobs: Sequence[float]) -> None:
    with replacing(file) as temporary, temporary.open("wb") as stream:
        np.save(stream, np.asarray(logprobs, dtype=np.float32))
