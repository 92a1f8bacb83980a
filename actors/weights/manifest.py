"""The transfer format of weights: a header, flat buckets of bytes, and a digest per tensor (actors.weights.digest).

The trainer plans once (names, dtypes and shapes are known without gathering), then packs tensor by tensor into buckets
of bounded size. A tensor's digest is in the bucket with its last byte, so each side holds at most one bucket and one
tensor. Buckets are uint8 arrays, which any transport of arrays can send.

They are sent in the canonical form (actors.weights.canonical).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from actors.weights.digest import Digest, copied_part, digest
from orchestrator.errors import PublishError

Verify = Literal["full", "sampled", "checksums"]
Bytes = npt.NDArray[np.uint8]
ALIGNMENT_BYTES = 64
_HOST = torch.device("cpu")


@dataclass(frozen=True)
class TensorSpec:
    """One tensor in Hugging Face naming; dtype as in `torch.<dtype>`, e.g. "bfloat16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.torch_dtype.itemsize


@dataclass(frozen=True)
class WeightHeader:
    """All tensors of one publish, in transfer order, concatenated and cut into buckets."""

    tensors: tuple[TensorSpec, ...]
    bucket_bytes: int

    def __post_init__(self) -> None:
        names = [spec.name for spec in self.tensors]
        repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        if repeated or not names:
            raise PublishError(f"weight header needs distinct tensors, got {repeated or 'none'} more than once.")
        if self.bucket_bytes <= 0 or self.bucket_bytes % ALIGNMENT_BYTES:
            raise PublishError(
                f"bucket_bytes must be a positive multiple of {ALIGNMENT_BYTES}, got {self.bucket_bytes}."
            )

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(-(-spec.num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for spec in self.tensors))

    def start(self, index: int) -> int:
        """First byte of tensor `index` in the whole stream."""
        return self._ends[index - 1] if index else 0

    @property
    def stream_bytes(self) -> int:
        return self._ends[-1]

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.tensors)

    @property
    def num_buckets(self) -> int:
        return -(-self.stream_bytes // self.bucket_bytes)

    def bucket_size(self, index: int) -> int:
        return min(self.bucket_bytes, self.stream_bytes - index * self.bucket_bytes)

    def endings(self) -> list[list[str]]:
        """By bucket, the names of the tensors whose last byte, and so whose digest, is in it."""
        names: list[list[str]] = [[] for _ in range(self.num_buckets)]
        for number, spec in enumerate(self.tensors):
            names[max(0, self.start(number) + spec.num_bytes - 1) // self.bucket_bytes].append(spec.name)
        return names


@dataclass(frozen=True, eq=False)
class Bucket:
    """Bucket `index` of a header's stream, with the digests (hexadecimal) of the tensors that end in it. The bytes are
    an array, or a tensor on the device on which they are used."""

    index: int
    data: Bytes | torch.Tensor
    digests: Mapping[str, str]

    @property
    def num_bytes(self) -> int:
        return len(self.data)

    @property
    def tensor(self) -> torch.Tensor:
        """The bytes without a copy."""
        if isinstance(self.data, torch.Tensor):
            return self.data
        with warnings.catch_warnings():
            # Arrays that come from an object store are read-only; receivers only read.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(self.data)


def plan(tensors: Iterable[tuple[str, torch.dtype, Iterable[int]]], bucket_bytes: int) -> WeightHeader:
    """Plans (name, dtype, shape) into buckets of at most `bucket_bytes` (a multiple of 64)."""
    specs = (TensorSpec(name, str(dtype).removeprefix("torch."), tuple(shape)) for name, dtype, shape in tensors)
    return WeightHeader(tuple(specs), bucket_bytes)


Room = Callable[[int], torch.Tensor]
"""By bucket, at least as many bytes."""


def pack(
    header: WeightHeader, tensors: Iterable[tuple[str, torch.Tensor]], room: Room | None = None
) -> Iterator[Bucket]:
    """Yields the header's buckets, filled from (name, tensor) pairs in the header's order, cast to its dtypes. Holds
    one bucket and one tensor.

    Args:
        room: memory for each bucket, called when the bucket before it is no longer needed here; None: new memory of
            the host.

    Raises:
        PublishError: a wrong name or shape, a missing tensor or one too many.
    """
    find = room or (lambda index: torch.empty(header.bucket_size(index), dtype=torch.uint8))

    def new_bucket(index: int) -> tuple[torch.Tensor, dict[str, str]]:
        return find(index)[: header.bucket_size(index)], {}

    index = 0
    buffer, digests = new_bucket(0)
    pairs = iter(tensors)
    for number, spec in enumerate(header.tensors):
        source = _checked(spec, next(pairs, None)).detach().to(buffer.device).contiguous().reshape(-1)
        total = Digest(0, 0, 0)
        position, done = header.start(number), 0
        while done < spec.num_bytes:
            if position >= (index + 1) * header.bucket_bytes:
                yield _bucket(index, buffer, digests)
                index += 1
                del buffer
                buffer, digests = new_bucket(index)
            offset = position - index * header.bucket_bytes
            size = min(spec.num_bytes - done, len(buffer) - offset)
            first, last = (at // source.element_size() for at in (done, done + size))
            out = buffer[offset : offset + size].view(source.dtype)
            total += copied_part(source[first:last], out, spec.name, spec.shape, first)
            del out
            position, done = position + size, done + size
        del source
        digests[spec.name] = total.hex
    extra = next(pairs, None)
    if extra is not None:
        raise PublishError(
            f"the trainer yields {extra[0]!r} after the header's last tensor; plan and weights disagree."
        )
    yield _bucket(index, buffer, digests)


def _bucket(index: int, buffer: torch.Tensor, digests: Mapping[str, str]) -> Bucket:
    return Bucket(index, buffer.numpy() if buffer.device == _HOST else buffer, digests)


def _checked(spec: TensorSpec, pair: tuple[str, torch.Tensor] | None) -> torch.Tensor:
    if pair is None:
        raise PublishError(f"the trainer yields no {spec.name!r}, which the header announces.")
    name, tensor = pair
    if name != spec.name or tuple(tensor.shape) != spec.shape:
        raise PublishError(
            f"the trainer yields {name!r} {tuple(tensor.shape)} where the header announces {spec.name!r} {spec.shape}; "
            "yield tensors in the order of the plan."
        )
    return tensor.to(spec.torch_dtype)


@dataclass
class Unpacker:
    """Converts buckets, in order, to tensors, and compares their digests with the trainer's.

    Args:
        proved_later: whether the receiver itself compares a tensor's digest with the trainer's, after applying it.
        room: memory (bytes) for a tensor in several buckets, such as where it will be used; None: new memory.
    """

    header: WeightHeader
    proved_later: Callable[[TensorSpec], bool] = lambda _: False
    room: Callable[[TensorSpec], torch.Tensor | None] = lambda _: None
    _next_bucket: int = 0
    _next_tensor: int = 0
    _partial: torch.Tensor | None = None
    _filled: int = 0

    def add(self, bucket: Bucket) -> list[tuple[str, torch.Tensor]]:
        """Returns the tensors that end in this bucket; those that lie in it are views into it.

        Raises:
            PublishError: not the next bucket, a wrong size, or tensors (named) whose bytes differ from the trainer's.
        """
        size = self.header.bucket_size(bucket.index) if bucket.index == self._next_bucket else -1
        if bucket.num_bytes != size:
            raise PublishError(
                f"expected bucket {self._next_bucket} of {self.header.num_buckets}, got bucket {bucket.index} "
                f"with {bucket.num_bytes} bytes; send buckets once each, in order."
            )
        self._next_bucket += 1
        first = self._next_tensor
        complete = list(self._cut(bucket))
        specs = self.header.tensors[first : self._next_tensor]
        tensors = [
            (name, data.view(spec.torch_dtype).reshape(spec.shape))
            for (name, data), spec in zip(complete, specs, strict=True)
        ]
        read_now = [pair for pair, spec in zip(tensors, specs, strict=True) if not self.proved_later(spec)]
        bad = [name for name, tensor in read_now if digest(tensor, name).hex != bucket.digests.get(name)]
        received = {name for name, _ in tensors}
        if bad or set(bucket.digests) != received:
            names = bad or sorted(set(bucket.digests) ^ received)
            raise PublishError(f"bytes received differ from the trainer's for {listed(names)}; publish again.")
        return tensors

    @property
    def done(self) -> bool:
        return self._next_bucket == self.header.num_buckets

    def _cut(self, bucket: Bucket) -> Iterator[tuple[str, torch.Tensor]]:
        begin, all_bytes = bucket.index * self.header.bucket_bytes, bucket.tensor
        while self._next_tensor < len(self.header.tensors):
            spec = self.header.tensors[self._next_tensor]
            offset = self.header.start(self._next_tensor) + self._filled - begin
            if offset >= bucket.num_bytes and spec.num_bytes:
                return
            data = all_bytes[offset : offset + spec.num_bytes - self._filled]
            if len(data) < spec.num_bytes:
                if self._partial is None:
                    room = self.room(spec)
                    self._partial = all_bytes.new_empty(spec.num_bytes) if room is None else room
                self._partial[self._filled : self._filled + len(data)] = data
                self._filled += len(data)
                if self._filled < spec.num_bytes:
                    return
                data = self._partial
            self._partial, self._filled = None, 0
            self._next_tensor += 1
            yield spec.name, data


def check_names(sent: Iterable[str], *, needed: Iterable[str], optional: Iterable[str] = ()) -> None:
    """Raises PublishError, which names tensors that only the engine or only the trainer has."""
    sent, needed = set(sent), set(needed)
    missing, extra = needed - sent, sent - needed - set(optional)
    if missing or extra:
        raise PublishError(
            f"trainer and engine hold different tensors: not sent: {listed(sorted(missing)) or 'none'}; unknown to the "
            f"engine: {listed(sorted(extra)) or 'none'}. Both must load the same architecture; for one whose names "
            "vLLM changes, set rollout.engine='hf'."
        )


def listed(names: Iterable[str], limit: int = 8) -> str:
    items = list(names)
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
