"""From Arrow rows to padded micro-batches. Everything is found by lengths; what stands in the padding never matters.

Shapes: B rows of a micro-batch, T tokens of its longest row (padding on the right), N = response tokens of its rows
laid end to end. Padding sits behind the last real token, where causal attention never looks, so no mask is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Input of one forward.

    Args:
        rows: row indices in their table; empty for a dummy, whose tokens count for nothing.
        input_ids_BT: right-padded tokens.
        state_index_N: positions in the flattened (B·T) hidden states from which response token n is chosen.
        targets_N: the response tokens.
        last_index_B: flattened position of each row's last token.
        lengths_B: response tokens of each row.
        columns: per-token columns (float32, N) and per-row columns (float32, B) that the loss reads.
        weight: 1, or 0 for a dummy.
    """

    rows: tuple[int, ...]
    input_ids_BT: Tensor
    state_index_N: Tensor
    targets_N: Tensor
    last_index_B: Tensor
    lengths_B: Tensor
    columns: Mapping[str, Tensor]
    weight: float = 1.0


class TokenRows:
    """A table's prompts, responses and per-token columns as flat numpy arrays, read once.

    Args:
        table: has `prompt_tokens` and `response_tokens`, and the named float columns: lists as long as the responses,
            or one number per row.
    """

    def __init__(self, table: pa.Table, columns: Sequence[str] = ()) -> None:
        self._prompts, self._prompt_offsets = _flatten(table["prompt_tokens"])
        self._responses, self._response_offsets = _flatten(table["response_tokens"])
        self._token_columns = {n: _flatten(table[n])[0] for n in columns if pa.types.is_list(table[n].type)}
        self._row_columns = {n: table[n].to_numpy() for n in columns if n not in self._token_columns}

    @property
    def num_rows(self) -> int:
        return len(self._prompt_offsets) - 1

    @property
    def response_lengths(self) -> npt.NDArray[np.int64]:
        return np.diff(self._response_offsets)

    @property
    def lengths(self) -> list[int]:
        """Tokens of every row, prompt and response together."""
        total: list[int] = (np.diff(self._prompt_offsets) + self.response_lengths).tolist()
        return total

    def token_column(self, name: str) -> npt.NDArray[np.float32]:
        return self._token_columns[name]

    def pack(self, rows: Sequence[int], device: torch.device) -> MicroBatch:
        """Pads rows to their longest; `rows` empty gives a one-row dummy of weight 0."""
        if not rows:
            return self._dummy(device)
        prompts = [self._prompts[slice(*self._prompt_offsets[row : row + 2])] for row in rows]
        responses = [self._responses[slice(*self._response_offsets[row : row + 2])] for row in rows]
        width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
        input_ids_BT = np.zeros((len(rows), width), dtype=np.int64)
        states, last = [], []
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            end = len(prompt) + len(response)
            input_ids_BT[i, : len(prompt)] = prompt
            input_ids_BT[i, len(prompt) : end] = response
            states.append(i * width + np.arange(len(prompt) - 1, end - 1))
            last.append(i * width + end - 1)
        tokens = {name: self._rows_of(flat, rows) for name, flat in self._token_columns.items()}
        per_row = {name: values[list(rows)] for name, values in self._row_columns.items()}
        return MicroBatch(
            tuple(rows),
            torch.from_numpy(input_ids_BT).to(device),
            torch.from_numpy(np.concatenate(states)).to(device),
            torch.from_numpy(np.concatenate(responses).astype(np.int64)).to(device),
            torch.tensor(last, device=device),
            torch.tensor([len(r) for r in responses], device=device),
            {name: torch.from_numpy(array.astype(np.float32)).to(device) for name, array in (tokens | per_row).items()},
        )

    def _rows_of(self, flat: npt.NDArray[np.float32], rows: Sequence[int]) -> npt.NDArray[np.float32]:
        return np.concatenate([flat[slice(*self._response_offsets[row : row + 2])] for row in rows])

    def _dummy(self, device: torch.device) -> MicroBatch:
        zero, one = torch.zeros(1, dtype=torch.int64, device=device), torch.ones(1, dtype=torch.int64, device=device)
        names = [*self._token_columns, *self._row_columns]
        columns = {name: torch.zeros(1, device=device) for name in names}
        return MicroBatch((), zero.new_zeros(1, 2), zero, zero, one, one, columns, weight=0.0)


def token_rows(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> TokenRows:
    """TokenRows of plain token lists (preference pairs, demonstrations)."""
    kind = pa.list_(pa.int32())
    return TokenRows(pa.table({"prompt_tokens": pa.array(prompts, kind), "response_tokens": pa.array(responses, kind)}))


def _flatten(lists: pa.ChunkedArray) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    array = lists.combine_chunks()
    lengths = array.value_lengths().to_numpy(zero_copy_only=False)
    return array.flatten().to_numpy(), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
