"""Rows of tokens on disk: a driver appends them, workers read those of a micro-batch. Memory holds 40 bytes per row.

A folder with one file of plain numbers per column, all rows laid end to end (docs/adr/0014-rows-on-disk.md):

prompts, responses     tokens (int32); a row's prompt ends where its first learned token begins
learn                  for every response token whether it is learned (bool)
ends                   for every row where its prompt and its response end (2 x int64), and its learned tokens (int64)

and, where a stage adds them:

reply                  for every response token whether it is of the reply (bool); others are learned prompts
quality, strength      for every row the quality of a reply, and its score where records have some (float32)
record                 for every row the number of its record (int64)
weights                for every row the weight of its record in the loss of each head of a reward model (float32)
"""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actors.learning.packing import TokenRows, flatten, num_marked
from orchestrator.run.storage import reading, replacing, writing

_TYPES: dict[str, type[np.generic]] = {"prompts": np.int32, "responses": np.int32, "learn": np.bool_, "ends": np.int64}
_ADDED: dict[str, type[np.generic]] = {
    "reply": np.bool_,
    "quality": np.float32,
    "strength": np.float32,
    "record": np.int64,
    "weights": np.float32,
}


class RowsWriter:
    """Appends rows to the files of a folder. `digest` identifies everything that was written."""

    def __init__(self, files: dict[str, Any]) -> None:
        self._files = files
        self._digests = {name: hashlib.sha256() for name in files}
        self._ends = np.zeros(2, dtype=np.int64)
        self.num_rows = self.num_learned = 0

    def append(self, table: pa.Table) -> None:
        """Appends rows with the columns prompt_tokens, response_tokens, learn, and those that were added."""
        (prompts, prompt_ends), (responses, response_ends) = (
            flatten(table[name]) for name in ("prompt_tokens", "response_tokens")
        )
        learn, _ = flatten(table["learn"])
        learned = num_marked(learn, response_ends)
        ends = np.stack([self._ends[0] + prompt_ends[1:], self._ends[1] + response_ends[1:], learned], axis=1)
        columns = {"prompts": prompts, "responses": responses, "learn": learn, "ends": ends}
        for name in self._files.keys() & _ADDED.keys():
            columns[name] = flatten(table[name])[0] if pa.types.is_list(table[name].type) else table[name].to_numpy()
        for name, values in columns.items():
            content = np.ascontiguousarray(values, dtype=(_TYPES | _ADDED)[name]).tobytes()
            self._files[name].write(content)
            self._digests[name].update(content)
        self._ends += (len(prompts), len(responses))
        self.num_rows += table.num_rows
        self.num_learned += int(learn.sum())

    @property
    def digest(self) -> str:
        return hashlib.sha256("".join(each.hexdigest() for each in self._digests.values()).encode()).hexdigest()


@contextmanager
def writing_rows(folder: Path, *added: str) -> Iterator[RowsWriter]:
    """The files appear in `folder` when the body has ended; workers of an earlier try can still read those before.

    Args:
        added: columns beside those that all rows have.

    Raises StorageError.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        paths = {name: stack.enter_context(replacing(folder / name)) for name in (*_TYPES, *added)}
        with ExitStack() as opened:
            yield RowsWriter({name: opened.enter_context(path.open("wb")) for name, path in paths.items()})


class StoredRows(TokenRows):
    """The rows of a folder. Raises StorageError.

    Args:
        tokens_added: columns that were added, of one value per response token.
        row_columns, shares_prompts, is_packed: see TokenRows.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tokens_added: Sequence[str] = (),
        row_columns: Mapping[str, npt.NDArray[Any]] = MappingProxyType({}),
        shares_prompts: bool = False,
        is_packed: bool = False,
    ) -> None:
        with reading(folder / "ends"):
            ends = np.fromfile(folder / "ends", dtype=np.int64).reshape(-1, 3)
        first = np.zeros((1, 2), dtype=np.int64)
        prompt_offsets, response_offsets = np.concatenate([first, ends[:, :2]]).T.copy()
        super().__init__(
            (_Column(folder / "prompts"), prompt_offsets),
            (_Column(folder / "responses"), response_offsets),
            _Column(folder / "learn"),
            ends[:, 2].copy(),
            token_columns={name: _Column(folder / name) for name in tokens_added},
            row_columns=row_columns,
            shares_prompts=shares_prompts,
            is_packed=is_packed,
        )


def row_column(folder: Path, name: str) -> npt.NDArray[Any]:
    """An added column of numbers per row, laid end to end. Raises StorageError."""
    with reading(folder / name):
        return np.fromfile(folder / name, dtype=_ADDED[name])


class _Column:
    """A file of numbers that is read by slices. Not a memory map: pages that one has touched count as the process's
    memory, and after an epoch these are all pages of the file."""

    def __init__(self, path: Path) -> None:
        self._path, self._type = path, np.dtype((_TYPES | _ADDED)[path.name])
        with reading(path):
            self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __getitem__(self, part: slice) -> npt.NDArray[Any]:
        size = self._type.itemsize
        with reading(self._path):
            content = os.pread(self._file, int(part.stop - part.start) * size, int(part.start) * size)
        return np.frombuffer(content, dtype=self._type)
