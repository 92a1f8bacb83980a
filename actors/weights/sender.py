"""The trainer's side of a publish: the policy sends its weights bucket by bucket."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch

from actors.learning.distributed import from_all
from actors.machine.allocator import trim_gpu
from actors.roles.policy import PolicyWorker
from actors.weights.canonical import canonical
from actors.weights.digest import Digest, Digests
from actors.weights.manifest import ALIGNMENT_BYTES, Bucket, Room, WeightHeader, listed, pack, plan
from actors.weights.transports.broken import TransportBroken
from actors.weights.transports.group import BroadcastGroup, Rendezvous
from actors.weights.transports.shared import SharedBucket, SharedBuffer, device_id
from orchestrator.errors import PublishError

_HOST = torch.device("cpu")
_SHARED_BUFFERS = 2  # one is filled while engines read the other


@dataclass(frozen=True)
class Packing:
    """How a transport wants the weights.

    Args:
        ranks: of the policy that pack; the others only take part in the collectives.
        where: buckets are put on the host, on the policy's device, or there into memory that engines map. On the device
            they are at least as large as the largest tensor, so that one bucket holds each tensor or two hold it.
    """

    ranks: Sequence[int] = (0,)
    where: Literal["host", "device", "shared"] = "host"


class PublishingPolicy(PolicyWorker):
    """A policy rank that can publish. All ranks make the same calls, because ZeRO-3 gathers each tensor together."""

    _buckets: Iterator[Bucket | None] | None = None
    _sending: BroadcastGroup | None = None
    _shared: Sequence[SharedBuffer] = ()

    def begin_publish(self, bucket_bytes: int, packing: Packing = Packing()) -> WeightHeader:
        """Restarts with the current weights, without gathering them yet."""
        specs = list(self.learner.weight_specs())
        if packing.where != "host":
            largest = max(prod(shape) * dtype.itemsize for _, dtype, shape in specs)
            bucket_bytes = max(bucket_bytes, -(-largest // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)
        header = plan(specs, bucket_bytes)
        packs, device = self.group.rank in packing.ranks, _HOST if packing.where == "host" else self.learner.device
        parts = self.digests_of_parts()
        weights = self.learner.full_weights(device=device, is_kept=packs, lends=True)
        if packs:
            room = self._shared_room(header) if packing.where == "shared" else _new_room(header, device)
            self._buckets = proved(pack(header, weights, room), parts, header.num_buckets)
        else:
            self._buckets = follow(header, weights)
        return header

    def _shared_room(self, header: WeightHeader) -> Room:
        """Both buffers in turn. Those of a publish that failed are used again: engines may still map them."""
        if not self._shared:
            size, device = header.bucket_size(0), self.learner.device  # the first bucket is the largest
            self._shared = [SharedBuffer(size, device) for _ in range(min(header.num_buckets, _SHARED_BUFFERS))]
        return lambda index: self._shared[index % _SHARED_BUFFERS].memory

    def digests_of_parts(self) -> dict[str, Digest]:
        """By name, the digest of each parameter that ZeRO-3 has partitioned: the sum over the parts of all ranks, each
        read where it is. It does not depend on gathering, which it proves."""
        mine = Digests()
        for name, part, shape, start in self.learner.weight_parts():
            mine.add(name, canonical(part), shape, start)
        totals: dict[str, Digest] = {}
        for found in from_all(mine.result(), self.group) if self.learner.is_partitioned else ():
            for name, digest_of_part in found.items():
                totals[name] = totals[name] + digest_of_part if name in totals else digest_of_part
        return totals

    def next_bucket(self) -> Bucket | None:
        """The next bucket, on ranks that pack.

        Raises:
            PublishError: there are no more buckets.
        """
        if self._buckets is None:
            raise PublishError("no publish has begun; call begin_publish first.")
        try:
            return next(self._buckets)
        except StopIteration:
            raise PublishError("no bucket is left; call begin_publish first.") from None

    def join(self, meeting: Rendezvous) -> None:
        """Rank 0 joins the group that broadcasts buckets, as its sender. Raises TransportBroken."""
        if self._sending is not None:
            self._sending.leave()
            self._sending = None
        self._sending = BroadcastGroup(meeting, 0, self.learner.device)

    def broadcast(self, num_buckets: int) -> None:
        """Sends all buckets. Also after a failure all ranks gather everything, so that none waits for another.

        Raises:
            TransportBroken: on rank 0.
        """
        broken: TransportBroken | None = None
        if self._sending is not None:
            self._sending.allow()
        for index in range(num_buckets):
            bucket = self.next_bucket()
            try:
                if bucket is not None and broken is None:
                    self._send(bucket, is_last=index + 1 == num_buckets)
            except TransportBroken as error:
                broken = error
                if self.group.world_size == 1:
                    break
            del bucket
        if broken is not None:
            raise broken

    def _send(self, bucket: Bucket, *, is_last: bool) -> None:
        if self._sending is None:
            raise TransportBroken("this rank has joined no group")
        self._sending.send(bucket)
        if is_last:
            self._sending.flush()

    def device_id(self) -> str:
        """Equal for processes that share a device."""
        return device_id(self.learner.device)

    def share_bucket(self) -> SharedBucket | None:
        """Packs the next bucket into shared memory, on ranks that pack. The bucket before the last must be read."""
        bucket = self.next_bucket()
        if bucket is None:
            return None
        buffer = self._shared[bucket.index % _SHARED_BUFFERS]
        buffer.settle()
        return SharedBucket(bucket.index, bucket.num_bytes, bucket.digests, {self.device_id(): buffer.handle})

    def end_publish(self) -> None:
        """Frees memory of the publish. Engines must have finished."""
        self._buckets = None
        for buffer in self._shared:
            buffer.close()
        self._shared = ()
        trim_gpu()  # an engine that catches up does so while the others sample


def _new_room(header: WeightHeader, device: torch.device) -> Room:
    return lambda index: torch.empty(header.bucket_size(index), dtype=torch.uint8, device=device)


def proved(buckets: Iterable[Bucket], parts: Mapping[str, Digest], num_buckets: int) -> Iterator[Bucket]:
    """The buckets. Gathered tensors must have the digests of their parts.

    Raises:
        PublishError: instead of the last bucket, so that other ranks need not wait for this one; names all that differ.
    """
    wrong: list[str] = []
    for bucket in buckets:
        wrong += [name for name, sent in bucket.digests.items() if name in parts and sent != parts[name].hex]
        if wrong and bucket.index + 1 == num_buckets:
            raise PublishError(
                f"{listed(wrong)} was gathered from the policy's ranks with other bytes than they hold. Start the run "
                "again: it continues from its last checkpoint."
            )
        yield bucket
        del bucket  # its memory, before the next one needs as much


def follow(header: WeightHeader, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[None]:
    """Yields once per bucket of `pack`, after taking as many tensors as `pack` takes for it, and packs nothing."""
    index = 0
    for number, (spec, _) in enumerate(zip(header.tensors, tensors, strict=True)):
        end = header.start(number) + spec.num_bytes
        while end > (index + 1) * header.bucket_bytes:
            yield None
            index += 1
    yield None
