"""Prompts in a temporary file without a name, which the system removes with the process. Memory: 8 bytes per prompt."""

from __future__ import annotations

import json
import os
import struct
import tempfile
import weakref
from array import array
from collections.abc import Callable, Sequence
from typing import TypeVar, overload

import numpy as np
import numpy.typing as npt

from orchestrator.errors import StorageError
from orchestrator.types import Prompt

Found = TypeVar("Found")

_HEAD = struct.Struct("<II")  # bytes of the tokens and of the rest
_READ_BYTES = 4096  # at once; most prompts are shorter


class PromptFile:
    """Appends prompts and reads them by their place. The file is in the folder that TMPDIR names.

    All methods raise StorageError.
    """

    def __init__(self) -> None:
        self._file = _stored(lambda: tempfile.TemporaryFile(prefix="rlhf-prompts-"))  # noqa: SIM115  closed with self
        weakref.finalize(self, self._file.close)
        self.num_bytes = self._num_written = 0

    def append(self, prompt: Prompt) -> int:
        """The prompt's place."""
        tokens = prompt.tokens.astype(np.int32).tobytes()
        rest = json.dumps([prompt.id, prompt.text, dict(prompt.meta)], ensure_ascii=False)
        content = rest.encode("utf-8", "surrogatepass")
        place = self.num_bytes
        entry = _HEAD.pack(len(tokens), len(content)) + tokens + content
        _stored(lambda: self._file.write(entry))
        self.num_bytes += len(entry)
        return place

    def at(self, place: int) -> Prompt:
        if self._num_written < self.num_bytes:
            _stored(self._file.flush)
            self._num_written = self.num_bytes
        found = self._read(place, _READ_BYTES)
        num_token_bytes, num_content_bytes = _HEAD.unpack_from(found)
        start, end = _HEAD.size + num_token_bytes, _HEAD.size + num_token_bytes + num_content_bytes
        if end > len(found):
            found += self._read(place + len(found), end - len(found))
        identity, text, meta = json.loads(found[start:end].decode("utf-8", "surrogatepass"))
        return Prompt(identity, text, np.frombuffer(found[_HEAD.size : start], np.int32).copy(), meta)

    def _read(self, place: int, num_bytes: int) -> bytes:
        return _stored(lambda: os.pread(self._file.fileno(), num_bytes, place))


class StoredPrompts(Sequence[Prompt]):
    """Some prompts of a file, in an order; each is read when it is asked for. A slice reads nothing."""

    def __init__(self, file: PromptFile, places: array[int] | npt.NDArray[np.int64]) -> None:
        self._file, self._places = file, np.asarray(places, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice) -> StoredPrompts: ...

    def __getitem__(self, index: int | slice) -> Prompt | StoredPrompts:
        if isinstance(index, slice):
            return StoredPrompts(self._file, self._places[index])
        return self._file.at(int(self._places[index]))


def _stored(work: Callable[[], Found]) -> Found:
    try:
        return work()
    except OSError as error:
        raise StorageError(
            f"the prompts can't be kept in a temporary file ({error.strerror or error}): free space in "
            "the temporary folder, or set TMPDIR to a folder with room."
        ) from error
