"""From Arrow rows to padded micro-batches. Lengths locate everything; padding contents never matter.

Shapes: B rows of a micro-batch, L lines of its input, T tokens of the longest line (padding on the right), N = response
tokens of all rows, concatenated, or only those that are learned from. A line is one row (then B = L), one segment of a
row, several rows of one prompt (sharing.py), or all rows of the micro-batch without padding (documents.py). Padding
follows the last real token, which causal attention never reads, so lines of one row or segment need no mask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby, islice, pairwise
from types import MappingProxyType
from typing import Any, Protocol, Self, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from actors.learning import documents, sharing

Tensor = torch.Tensor

_ANY_LENGTH = 2**31


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Input of one forward.

    Args:
        rows: row indices in their table; empty for a dummy, whose tokens are not counted.
        input_ids_BT: right-padded tokens, of lines where rows share them.
        state_index_N: positions in the flattened (L·T) hidden states from which response token n is chosen.
        targets_N: response tokens n.
        last_index_B: flattened position of each row's last token.
        lengths_B: number of each row's tokens among the N.
        columns: per-token columns (float32, N) and per-row columns (float32, B or B, H) that the loss reads.
        weight: 1, or 0 for a dummy.
        shared: further arguments of the forward if lines hold several rows, among them position_ids (L, T).
    """

    rows: tuple[int, ...]
    input_ids_BT: Tensor
    state_index_N: Tensor
    targets_N: Tensor
    last_index_B: Tensor
    lengths_B: Tensor
    columns: Mapping[str, Tensor]
    weight: float = 1.0
    shared: Mapping[str, Any] = field(default_factory=dict)


class Flat(Protocol):
    """Numbers of all rows, laid end to end, of which slices are read."""

    def __getitem__(self, part: slice, /) -> npt.NDArray[Any]: ...


class TokenRows:
    """Prompts, responses and per-token columns as flat arrays.

    Args:
        prompts, responses: tokens of all rows laid end to end, and where each row starts and the last one ends.
        chosen: marks the response tokens that are learned from; the others are only input.
        learned_lengths: number of each row's marked tokens.
        token_columns, row_columns: what else a loss reads: one number per response token, or per row.
        shares_prompts: `pack` puts neighbours with the same prompt in one line where that is less work.
        is_packed: rows that do not share their prompt are laid end to end in one line, unless they are equally long.
    """

    def __init__(
        self,
        prompts: tuple[Flat, npt.NDArray[np.int64]],
        responses: tuple[Flat, npt.NDArray[np.int64]],
        chosen: Flat,
        learned_lengths: npt.NDArray[np.int64],
        *,
        token_columns: Mapping[str, Flat] = MappingProxyType({}),
        row_columns: Mapping[str, npt.NDArray[Any]] = MappingProxyType({}),
        shares_prompts: bool = False,
        is_packed: bool = False,
    ) -> None:
        self._prompts, self._prompt_offsets = prompts
        self._responses, self._response_offsets = responses
        self._chosen, self.learned_lengths = chosen, learned_lengths
        self._starts: Sequence[Sequence[int]] | None = None
        self._token_columns, self._row_columns = token_columns, row_columns
        self._shares_prompts, self.is_packed = shares_prompts, is_packed

    @classmethod
    def of_table(
        cls,
        table: pa.Table,
        columns: Sequence[str] = (),
        *,
        learned_only: bool = False,
        shares_prompts: bool = False,
    ) -> TokenRows:
        """The rows of a table.

        Args:
            table: has `prompt_tokens` and `response_tokens`, `starts` if rows have several segments, and the named
                float columns: lists as long as the responses, or one number per row.
            learned_only: response tokens that the table's column `learn` does not mark are only input.
        """
        responses, offsets = flatten(table["response_tokens"])
        chosen = flatten(table["learn"])[0] if learned_only else np.ones(len(responses), np.bool_)
        lists = {name for name in columns if pa.types.is_list(table[name].type)}
        found = cls(
            flatten(table["prompt_tokens"]),
            (responses, offsets),
            chosen,
            num_marked(chosen, offsets),
            token_columns={name: flatten(table[name])[0] for name in columns if name in lists},
            row_columns={name: table[name].to_numpy() for name in columns if name not in lists},
            shares_prompts=shares_prompts,
        )
        return found._in_segments(table["starts"].to_pylist() if "starts" in table.column_names else ())

    def with_column(self, name: str, values: npt.NDArray[Any]) -> Self:
        """With one more number per row."""
        found = copy(self)
        found._row_columns = {**self._row_columns, name: values}
        return found

    def take(self, rows: Sequence[int]) -> TokenRows:
        """Only these rows, in memory."""
        texts = [self.texts(row) for row in rows]
        marks = [self._chosen_of(row) for row in rows]
        spans = [slice(*self._response_offsets[row : row + 2]) for row in rows]
        found = TokenRows(
            _end_to_end([prompt for prompt, _ in texts]),
            _end_to_end([response for _, response in texts]),
            _end_to_end(marks)[0],
            self.learned_lengths[list(rows)],
            token_columns={
                name: _end_to_end([flat[span] for span in spans])[0] for name, flat in self._token_columns.items()
            },
            row_columns={name: values[list(rows)] for name, values in self._row_columns.items()},
            shares_prompts=self._shares_prompts,
            is_packed=self.is_packed,
        )
        return found._in_segments([self._starts_of(row) for row in rows])

    def _in_segments(self, starts: Sequence[Sequence[int]]) -> Self:
        """With rows of several segments: where in its response each row begins further ones."""
        self._starts = starts if any(map(len, starts)) else None
        return self

    @property
    def num_rows(self) -> int:
        return len(self._prompt_offsets) - 1

    @cached_property
    def prompt_of(self) -> list[int]:
        """An id of each row's prompt; adjacent rows with the same prompt have the same id."""
        found, number = [0] * self.num_rows, 0
        for row in range(1, self.num_rows):
            number += not np.array_equal(self.texts(row)[0], self.texts(row - 1)[0])
            found[row] = number
        return found

    @cached_property
    def response_lengths(self) -> npt.NDArray[np.int64]:
        return np.diff(self._response_offsets)

    @cached_property
    def row_lengths(self) -> npt.NDArray[np.int64]:
        """Number of tokens of each row, prompt and response together."""
        total: npt.NDArray[np.int64] = np.diff(self._prompt_offsets) + self.response_lengths
        return total

    @property
    def lengths(self) -> list[int]:
        """`row_lengths` as Python's numbers."""
        total: list[int] = self.row_lengths.tolist()
        return total

    def bundles(self, *, longest: int, shared: bool, part: range | None = None) -> list[tuple[int, ...]]:
        """The rows in lines of at most `longest` tokens: with `shared`, rows of one prompt together, otherwise one per
        line. `part`: only these rows; None: all."""
        rows = range(self.num_rows) if part is None else part
        return self._bundles(rows, longest) if shared else [(row,) for row in rows]

    def lines(self, rows: Sequence[int]) -> list[tuple[int, ...]]:
        """The lines in which `pack` puts these rows."""
        return self._bundles(rows, _ANY_LENGTH) if self._shares_prompts else [(row,) for row in rows]

    def _bundles(self, rows: Sequence[int], longest: int) -> list[tuple[int, ...]]:
        """Rows of several segments stay alone."""
        found: list[tuple[int, ...]] = []
        for is_alone, run in groupby(rows, key=lambda row: len(self._starts_of(row)) > 0):
            some = list(run)
            if is_alone:
                found += [(row,) for row in some]
                continue
            texts = [self.texts(row) for row in some]
            prompts, responses = [prompt for prompt, _ in texts], [response for _, response in texts]
            lines = sharing.bundles(prompts, responses, longest=longest)
            found += [tuple(some[i] for i in line) for line in lines]
        return found

    def line_length(self, line: Sequence[int]) -> int:
        """Number of tokens of a line: its prompt once, and all responses; of a row of several segments with the
        padding between them."""
        lengths = self._segment_lengths(line)
        return sum(lengths) if self.is_packed else len(lengths) * max(lengths)

    def _segment_lengths(self, line: Sequence[int]) -> list[int]:
        """Numbers of tokens of what does not see each other in a line: one, or those of a row's segments."""
        prompt = self._prompt_offsets[line[0] + 1] - self._prompt_offsets[line[0]]
        whole = int(prompt + self.response_lengths[list(line)].sum())
        edges = [0, *(int(prompt) + start for start in self._starts_of(line[0])), whole]
        return [end - start for start, end in pairwise(edges)]

    def _starts_of(self, row: int) -> Sequence[int]:
        return () if self._starts is None else self._starts[row]

    def token_column(self, name: str) -> npt.NDArray[np.float32]:
        """Of all rows laid end to end, the tokens that are learned from. Of rows in memory."""
        values = cast(npt.NDArray[np.float32], self._token_columns[name])
        return values[cast(npt.NDArray[np.bool_], self._chosen)]

    def row_column(self, name: str) -> npt.NDArray[Any]:
        return self._row_columns[name]

    def pack(self, rows: Sequence[int], device: torch.device) -> MicroBatch:
        """Pads rows to the longest, or lays them end to end. Empty `rows` gives a one-row dummy of weight 0."""
        return self.pack_lines(self.lines(rows), device)

    def pack_lines(self, lines: Sequence[Sequence[int]], device: torch.device) -> MicroBatch:
        """As `pack`; the rows of a line share one prompt, which is at the beginning of the line. The segments of a row
        get a line each."""
        if not lines:
            return self._dummy(device)
        rows = [row for line in lines for row in line]
        texts = {row: self.texts(row) for row in rows}
        begins, shape, shared = self._places(lines, device)
        input_ids = np.zeros(math.prod(shape), dtype=np.int64)
        states, last = [], []
        for places, line in zip(begins, lines, strict=True):
            if len(places) > 1:
                before, end = self._lay(line[0], places, input_ids)
                states.append(before[self._chosen_of(line[0])])
                last.append(end - 1)
                continue
            (begin,), prompt = places, texts[line[0]][0]
            input_ids[begin : begin + len(prompt)] = prompt
            prompt_end = start = begin + len(prompt)
            for row in line:
                end = start + len(texts[row][1])
                input_ids[start:end] = texts[row][1]
                before = np.arange(start - 1, end - 1)
                # The first token is chosen where the prompt ends. Without a prompt nothing chooses it; only a scorer
                # has such rows (of a transcript that lost its start), and it reads the last state alone.
                before[:1] = max(prompt_end - 1, begin)
                states.append(before[self._chosen_of(row)])
                last.append((end if end > start else prompt_end) - 1)
                start = end
        tokens = {name: self._rows_of(flat, rows) for name, flat in self._token_columns.items()}
        per_row = {name: values[list(rows)] for name, values in self._row_columns.items()}
        return MicroBatch(
            tuple(rows),
            torch.from_numpy(input_ids.reshape(shape)).to(device),
            torch.from_numpy(np.concatenate(states)).to(device),
            torch.from_numpy(self._rows_of(self._responses, rows).astype(np.int64)).to(device),
            torch.tensor(last, device=device),
            torch.tensor(self.learned_lengths[rows].tolist(), device=device),
            {name: torch.from_numpy(array.astype(np.float32)).to(device) for name, array in (tokens | per_row).items()},
            shared=shared,
        )

    def _lay(
        self, row: int, begins: Sequence[int], input_ids: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], int]:
        """Writes the segments of a row into the input. Returns where each response token is chosen, and the end of the
        last one. The first token of a segment is input alone; only its own place stands for it."""
        prompt, response = self.texts(row)
        edges = [0, *self._starts_of(row), len(response)]
        before, end = np.zeros(len(response), np.int64), 0
        for begin, start, stop in zip(begins, edges[:-1], edges[1:], strict=True):
            lead = prompt if start == 0 else prompt[:0]
            first, end = begin + len(lead), begin + len(lead) + stop - start
            input_ids[begin:first], input_ids[first:end] = lead, response[start:stop]
            before[start:stop] = np.maximum(np.arange(first - 1, end - 1), begin)
        return before, end

    def texts(self, row: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """(prompt, response)"""
        prompt = self._prompts[slice(*self._prompt_offsets[row : row + 2])]
        return prompt, self._responses[slice(*self._response_offsets[row : row + 2])]

    def _places(
        self, lines: Sequence[Sequence[int]], device: torch.device
    ) -> tuple[list[list[int]], tuple[int, int], dict[str, Any]]:
        """(where the segments of each line begin in the flattened input, shape of the input, further arguments of the
        forward)"""
        counts = [self._segment_lengths(line) for line in lines]
        lengths = [length for segments in counts for length in segments]
        is_single = all(len(line) == 1 for line in lines)
        if self.is_packed and is_single and len(set(lengths)) > 1:
            begins, shape = [0, *np.cumsum(lengths)[:-1].tolist()], (1, sum(lengths))
            shared = documents.arguments(lengths, device)
        else:
            width = max(lengths)
            begins, shape = [i * width for i in range(len(lengths))], (len(lengths), width)
            shared = {} if is_single else self._shared(lines, width, device)
        following = iter(begins)
        return [list(islice(following, len(segments))) for segments in counts], shape, shared

    def _shared(self, lines: Sequence[Sequence[int]], width: int, device: torch.device) -> dict[str, Any]:
        found = []
        for line in lines:
            segments = self._segment_lengths(line)
            if len(segments) > 1:
                found += [sharing.owners(length, (), width) for length in segments]
                continue
            responses = self.response_lengths[list(line)].tolist()
            found.append(sharing.owners(segments[0] - sum(responses), responses, width))
        owner_LT, position_LT = (torch.from_numpy(np.stack(arrays)).to(device) for arrays in zip(*found, strict=True))
        return {"position_ids": position_LT, "attention_mask": sharing.visible(owner_LT)}

    def _chosen_of(self, row: int) -> npt.NDArray[np.bool_]:
        chosen: npt.NDArray[np.bool_] = self._chosen[slice(*self._response_offsets[row : row + 2])]
        return chosen

    def _rows_of(self, flat: Flat, rows: Sequence[int]) -> npt.NDArray[Any]:
        return np.concatenate(
            [flat[slice(*self._response_offsets[row : row + 2])][self._chosen_of(row)] for row in rows]
        )

    def _dummy(self, device: torch.device) -> MicroBatch:
        zero, one = torch.zeros(1, dtype=torch.int64, device=device), torch.ones(1, dtype=torch.int64, device=device)
        columns = {name: torch.zeros(1, device=device) for name in self._token_columns}
        columns |= {name: torch.zeros(1, *each.shape[1:], device=device) for name, each in self._row_columns.items()}
        return MicroBatch((), zero.new_zeros(1, 2), zero, zero, one, one, columns, weight=0.0)


def row_sums(values_N: Tensor, lengths_B: Tensor) -> Tensor:
    """The sum of each row's values; the same bits however many rows there are, and on every run."""
    return torch.stack([row.sum() for row in values_N.split(lengths_B.tolist())])


def row_maxima(values_N: Tensor, lengths_B: Tensor) -> Tensor:
    """The largest of each row's values; each row has at least one."""
    return torch.stack([row.max() for row in values_N.split(lengths_B.tolist())])


def token_rows(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> TokenRows:
    """TokenRows of plain token lists (preference pairs, demonstrations)."""
    kind = pa.list_(pa.int32())
    return TokenRows.of_table(
        pa.table({"prompt_tokens": pa.array(prompts, kind), "response_tokens": pa.array(responses, kind)})
    )


def num_marked(marks: npt.NDArray[np.bool_], offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Number of marks of each row; rows are laid end to end."""
    return np.diff(np.concatenate([[0], np.cumsum(marks)])[offsets])


def _end_to_end(parts: Sequence[npt.NDArray[Any]]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """The values of all parts, and where each part starts and the last one ends."""
    offsets = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    return np.concatenate(parts) if parts else np.zeros(0, np.int32), offsets


def flatten(lists: pa.ChunkedArray) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """The values of all lists laid end to end, and where each list starts and the last one ends."""
    array = lists.combine_chunks()
    lengths = array.value_lengths().to_numpy(zero_copy_only=False)
    return array.flatten().to_numpy(zero_copy_only=False), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
