"""Buckets in memory that the policy's rank and an engine's worker both map, because they share a device.

On a GPU the memory is shared by CUDA IPC. On CPUs, which tests use, it is a file without a name, mapped by both. The
device is identified by the GPU's UUID, or by the host's boot id.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from actors.weights.manifest import Bucket
from actors.weights.transports.broken import TransportBroken

# Places among the arguments of rebuild_cuda_tensor: the index of the device, which differs between processes, and the
# file of the counter with its number in there.
_DEVICE, _COUNTER, _NUMBER = 6, 11, 12
_NO_COUNTER = b"/counts-nothing"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class SharedBucket:
    """A bucket whose bytes are in shared memory: by device, how to map it."""

    index: int
    num_bytes: int
    digests: Mapping[str, str]
    handles: Mapping[str, Any]


def device_id(device: torch.device) -> str:
    """The same in all processes that can share memory on `device`."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_properties(device).uuid)
    return _BOOT_ID.read_text(encoding="ascii").strip()


class SharedBuffer:
    """Memory that other processes can map with `handle` while this object exists: any number of them, or none."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._device, self._fd = device, -1
        self.handle: Any
        if device.type == "cuda":
            self.memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            self.handle, self._counter = uncounted(reduce_tensor(self.memory)[1])
        else:
            self._fd = os.memfd_create("publish")
            os.ftruncate(self._fd, num_bytes)
            self.handle = f"/proc/{os.getpid()}/fd/{self._fd}", num_bytes
            self.memory = _mapped(self.handle)

    def settle(self) -> None:
        """Returns when all that was written is there for other processes."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def close(self) -> None:
        """No other process may still map the memory."""
        if self._fd >= 0:
            os.close(self._fd)
        else:
            torch.UntypedStorage._release_ipc_counter(*self._counter)
        del self.memory


def uncounted(arguments: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[bytes, int]]:
    """A handle without its counter, and the counter.

    torch counts down when a mapping of an export is closed, and frees the memory at exactly 0, from 1: never, if no
    process mapped it, as an engine that died, or if two did. A counter that does not exist is ignored.
    """
    handle = list(arguments)
    handle[_COUNTER] = _NO_COUNTER
    return tuple(handle), (arguments[_COUNTER], arguments[_NUMBER])


class SharedReader:
    """Maps the buffers of one publish, each once.

    Args:
        copies: whether `take` returns copies. Otherwise a bucket changes when the policy fills its buffer again, as it
            does after the call that applies the bucket. On GPUs they are always copies: work is only queued there.
    """

    def __init__(self, device: torch.device, *, copies: bool) -> None:
        self._device, self._copies = device, copies or device.type == "cuda"
        self._mapped: dict[Any, torch.Tensor] = {}

    def take(self, parcel: SharedBucket) -> Bucket:
        """Raises:
        TransportBroken: no rank of the policy shares this device, or its memory is gone.
        """
        mine = device_id(self._device)
        if mine not in parcel.handles:
            raise TransportBroken(f"no rank of the policy is on the device {mine} of this engine")
        handle = parcel.handles[mine]
        try:
            if handle not in self._mapped:
                self._mapped[handle] = self._open(handle)
            data = self._mapped[handle][: parcel.num_bytes]
            if self._copies:
                data = data.clone()
            if self._device.type == "cuda":  # the policy may fill the buffer again as soon as this returns
                torch.cuda.current_stream(self._device).synchronize()
        except (RuntimeError, OSError) as error:
            raise TransportBroken(f"the memory of the policy's rank can't be mapped: {error}") from error
        return Bucket(parcel.index, data, parcel.digests)

    def close(self) -> None:
        self._mapped = {}

    def _open(self, handle: Any) -> torch.Tensor:
        if self._device.type != "cuda":
            return _mapped(handle)
        arguments = list(handle)
        arguments[_DEVICE] = self._device.index
        tensor: torch.Tensor = rebuild_cuda_tensor(*arguments)
        return tensor


def _mapped(handle: tuple[str, int]) -> torch.Tensor:
    path, num_bytes = handle
    return torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8)
