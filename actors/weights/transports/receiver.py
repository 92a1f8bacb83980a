"""The receiving end of all transports, in each worker of an engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from actors.weights.manifest import Bucket, WeightHeader
from actors.weights.transports.broken import TransportBroken
from actors.weights.transports.group import BroadcastGroup, Rendezvous
from actors.weights.transports.shared import SharedBucket, SharedReader


@dataclass(frozen=True)
class Announced:
    """The next bucket, which the group's broadcast brings."""


Parcel = Bucket | SharedBucket | Announced


class Receiver:
    """Turns parcels into buckets.

    Args:
        device: of the worker; buckets from a group or from shared memory are on it, others on the host.
        keeps: whether the engine still uses a bucket after the call in which it takes it.
    """

    def __init__(self, device: torch.device, *, keeps: bool) -> None:
        self.device = device
        self._shared = SharedReader(device, copies=keeps)
        self._group: BroadcastGroup | None = None
        self._header: WeightHeader | None = None
        self._broadcast: Iterator[Bucket] | None = None

    def join(self, meeting: Rendezvous, rank: int) -> None:
        """Leaves the group of before, if any, and joins this one. Raises TransportBroken."""
        self.leave()
        self._group = BroadcastGroup(meeting, rank, self.device)

    def begin(self, header: WeightHeader) -> None:
        """A publish begins."""
        self._header, self._broadcast = header, None
        self._shared.close()

    def take(self, parcel: Parcel) -> Bucket:
        """Raises TransportBroken."""
        if isinstance(parcel, Bucket):
            return parcel
        if isinstance(parcel, SharedBucket):
            return self._shared.take(parcel)
        if self._group is None or self._header is None:
            raise TransportBroken("a broadcast was announced to a worker that is in no group")
        if self._broadcast is None:
            self._broadcast = self._group.receive(self._header)
        bucket = next(self._broadcast, None)
        if bucket is None:
            raise TransportBroken("a broadcast was announced after the last bucket of the publish")
        return bucket

    def finish(self) -> None:
        """Unmaps shared memory, which the policy then frees."""
        self._shared.close()

    def leave(self) -> None:
        self.finish()
        if self._group is not None:
            self._group.leave()
            self._group = None
