"""Gives back a device's memory while others need it: contents of tensors move to the host, and back.

Whole storages are emptied and filled again, so that views, flat buffers and aliases of them stay what they are, and
nothing in a library has to know. DeepSpeed's own `offload_states` is not used: it has none for stage 0 and for
bf16 in stage 1, and in stage 3 only for its own compiled Adam (docs/adr/0023-learners-on-gpus.md).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_BLOCK_BYTES = 1 << 28
"""Of pinned memory, of which torch's allocator rounds every piece up to a power of two."""
_FOLLOWED = ("deepspeed.", "torch.optim.")
_SEQUENCES = (list, tuple, set, frozenset, deque)


class Rest:
    """The contents that are away from a device. On GPUs they are in pinned memory, which is kept for the next time:
    to pin memory takes longer than to fill it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._blocks: list[Tensor] = []
        self._away: list[tuple[torch.UntypedStorage, int]] = []

    @property
    def num_bytes(self) -> int:
        """Away at the moment."""
        return sum(size for _, size in self._away)

    def leave(self, tensors: Iterable[Tensor]) -> None:
        """Moves the contents of tensors to the host, and frees their memory."""
        _synchronize(self._device)
        start = self.num_bytes
        for storage in _storages(tensors, self._device):
            size = storage.nbytes()
            for inside, host in self._pieces(start, size):
                host.copy_(_bytes_of(storage)[inside], non_blocking=True)
            self._away.append((storage, size))
            start += size
        _synchronize(self._device)
        for storage, _ in self._away:
            storage.resize_(0)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def come_back(self) -> None:
        """Fills all tensors again."""
        start = 0
        for storage, size in self._away:
            storage.resize_(size)
            for inside, host in self._pieces(start, size):
                _bytes_of(storage)[inside].copy_(host, non_blocking=True)
            start += size
        _synchronize(self._device)
        self._away = []
        if self._device.type == "cpu":
            self._blocks = []

    def _pieces(self, start: int, size: int) -> Iterator[tuple[slice, Tensor]]:
        """(bytes of a storage, where they are on the host) of one that begins `start` bytes from the first."""
        done = 0
        while done < size:
            index, offset = divmod(start + done, _BLOCK_BYTES)
            if index == len(self._blocks):
                pinned = self._device.type == "cuda"
                self._blocks.append(torch.empty(_BLOCK_BYTES, dtype=torch.uint8, pin_memory=pinned))
            length = min(size - done, _BLOCK_BYTES - offset)
            yield slice(done, done + length), self._blocks[index][offset : offset + length]
            done += length


def tensors_within(*roots: Any) -> Iterator[Tensor]:
    """All tensors that modules, optimizers and DeepSpeed's objects hold, with their gradients and attributes."""
    seen: dict[int, Any] = {}  # with the values, so that no number is used twice
    waiting = list(roots)
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, Tensor):
            yield value
            waiting += [value.grad if value.is_leaf else None, vars(value)]
        elif isinstance(value, Mapping):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, _SEQUENCES):
            waiting += value
        elif isinstance(value, nn.Module) or type(value).__module__.startswith(_FOLLOWED):
            waiting.append(getattr(value, "__dict__", None))


def weights_of(model: nn.Module) -> Iterator[Tensor]:
    """What a forward reads: parameters, with ZeRO-3 this rank's part of them, and buffers."""
    for tensor in (*model.parameters(), *model.buffers()):
        yield tensor
        for name in ("ds_tensor", "ds_secondary_tensor"):
            part = getattr(tensor, name, None)
            if part is not None:
                yield part


def pointers(tensors: Iterable[Tensor]) -> set[int]:
    """Where their storages begin."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def _storages(tensors: Iterable[Tensor], device: torch.device) -> list[torch.UntypedStorage]:
    """The distinct storages of tensors on a device that can be emptied. A file that is mapped into memory can't."""
    found: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors:
        if tensor.layout == torch.strided and tensor.device == device:
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.resizable():
                found[storage.data_ptr()] = storage
    return list(found.values())


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (storage.nbytes(),), (1,))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
