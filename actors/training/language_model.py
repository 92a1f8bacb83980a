"""Shared parts of language-model training: rows of learned tokens as a dataset, and loading the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from actors.learning.distributed import Group
from actors.learning.heads import PolicyModel
from actors.learning.packing import TokenRows
from actors.models.model import load_causal, resolve_model, torch_dtype
from actors.text.conversations import Chat, load_chat
from actors.training.task import TaskInputs
from orchestrator.planning.balance import plan_minibatches


@dataclass(frozen=True)
class PolicyTraining(TaskInputs):
    """Inputs of a task that trains the policy, which is its initial model."""

    def load(self) -> tuple[Chat, PolicyModel]:
        """Raises DataError: the model, its tokenizer or its template."""
        model = self.policy
        folder = resolve_model(model.path, self.cache)
        language_model = load_causal(
            folder, torch_dtype(model.compute_dtype), trust_remote_code=model.trust_remote_code
        )
        return load_chat(folder, model, self.template), PolicyModel(language_model, temperature=1.0)


@dataclass(frozen=True, eq=False)
class LearnedRows:
    """A Dataset (task.py) of rows with marked tokens (actors.text.learned); each row is a record."""

    rows: TokenRows

    @property
    def num_records(self) -> int:
        return self.rows.num_rows

    def num_tokens(self, records: Sequence[int]) -> int:
        return int(self.rows.row_lengths[list(records)].sum())

    def num_learned(self, records: Sequence[int]) -> float:
        return float(self.rows.learned_lengths[list(records)].sum())

    def micro_batches(self, records: Sequence[int], group: Group, micro_batch_tokens: int) -> list[tuple[int, ...]]:
        (ranks,) = plan_minibatches(
            self.rows.row_lengths[list(records)].tolist(),
            num_minibatches=1,
            num_ranks=group.world_size,
            micro_batch_tokens=micro_batch_tokens,
            seed=0,
            is_packed=self.rows.is_packed,
        )
        return [tuple(records[number] for number in micro) for micro in ranks[group.rank]]
