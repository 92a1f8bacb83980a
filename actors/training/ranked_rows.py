"""Ranked replies in tokens, and how a batch of them is cut into micro-batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from actors.learning.distributed import Group
from actors.learning.objectives.preference import mismatched
from actors.learning.packing import TokenRows
from actors.training.stored_rows import StoredRows, row_column
from actors.training.trainer import Passes, training_batches
from orchestrator.planning.balance import plan_minibatches

Value = TypeVar("Value")

_EXACT = 2**24  # integers below it are exact as float32


@dataclass(frozen=True, eq=False)
class RankedRows:
    """Tokens of all replies; record i owns the rows first_row[i] to first_row[i + 1]."""

    rows: TokenRows
    first_row: npt.NDArray[np.int64]

    @property
    def num_records(self) -> int:
        return len(self.first_row) - 1

    def rows_of(self, record: int) -> range:
        return range(self.first_row[record], self.first_row[record + 1])

    def by_record(self, values: Sequence[Value]) -> list[list[Value]]:
        """Values of all rows, of every record together."""
        return [[values[row] for row in self.rows_of(record)] for record in range(self.num_records)]

    def num_tokens(self, records: Sequence[int]) -> int:
        lengths = self.rows.row_lengths
        return sum(int(lengths[self.first_row[i] : self.first_row[i + 1]].sum()) for i in records)

    def with_reference(self, logprobs: npt.NDArray[np.float32]) -> RankedRows:
        """With the log-prob of every row under the reference, which a preference loss compares with."""
        return replace(self, rows=self.rows.with_column("reference", logprobs))

    def micro_batches(self, records: Sequence[int], group: Group, micro_batch_tokens: int) -> list[tuple[int, ...]]:
        """Rows of this rank's micro-batches of one batch: the replies of a record stay together, whatever the budget.

        Every rank gets as many micro-batches; an empty one keeps it in step.
        """
        # Counting every record as wide as the widest keeps lines times longest line within the budget for mixed K.
        lines = [self.rows.lines(self.rows_of(record)) for record in records]
        most_lines = max(map(len, lines))
        costs = [most_lines * max(self.rows.line_length(line) for line in found) for found in lines]
        (ranks,) = plan_minibatches(
            costs, num_minibatches=1, num_ranks=group.world_size, micro_batch_tokens=micro_batch_tokens, seed=0
        )
        return [tuple(row for i in micro for row in self.rows_of(records[i])) for micro in ranks[group.rank]]


def stored_rankings(
    folder: Path, *, shares_prompts: bool = False, tokens_added: Sequence[str] = (), num_weights: int = 0
) -> RankedRows:
    """The rows of a folder that `ranked_tokens.py` made.

    Args:
        shares_prompts: the prompt of a record is computed once for its replies where that is less work (sharing.py).
        tokens_added: see StoredRows.
        num_weights: of every row, in the loss of each reward head, if they were stored.

    Raises StorageError.
    """
    record = row_column(folder, "record")
    weights = {"weights": row_column(folder, "weights").reshape(-1, num_weights)} if num_weights else {}
    rows = StoredRows(
        folder,
        tokens_added=tokens_added,
        row_columns={
            "quality": row_column(folder, "quality"),
            "strength": row_column(folder, "strength"),
            "group": (record % _EXACT).astype(np.float32),
            **weights,
        },
        shares_prompts=shares_prompts,
    )
    return RankedRows(rows, first_rows(record))


def first_rows(record: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where each record begins and the last one ends. `record`: the number of every row's record, in order."""
    begins = np.flatnonzero(np.diff(record, prepend=-1))
    return np.concatenate([begins, [len(record)]]).astype(np.int64)


class Mismatched:
    """The pairs (i, j) of a whole training, a prompt with the reply to another, in the order of their first use; rows
    of their tokens are in the same order. Memory: 24 bytes per pair."""

    def __init__(self, num_records: int, passes: Passes, seed: int) -> None:
        self._num_records = num_records
        batches = training_batches(num_records, passes, seed)
        used = [self._keys(mismatched(records)) for _, _, records in batches]
        keys = np.concatenate(used) if used else np.zeros(0, np.int64)
        self._keys_sorted, first_use = np.unique(keys, return_index=True)
        self._row = np.argsort(np.argsort(first_use))

    def __len__(self) -> int:
        return len(self._row)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for place in np.argsort(self._row):
            i, j = divmod(int(self._keys_sorted[place]), self._num_records)
            yield i, j

    def rows_of(self, pairs: Iterable[tuple[int, int]]) -> list[int]:
        """The row of each pair."""
        found: list[int] = self._row[np.searchsorted(self._keys_sorted, self._keys(pairs))].tolist()
        return found

    def _keys(self, pairs: Iterable[tuple[int, int]]) -> npt.NDArray[np.int64]:
        return np.array([i * self._num_records + j for i, j in pairs], dtype=np.int64)
