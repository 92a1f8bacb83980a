"""The group over which rank 0 of the policy broadcasts buckets to the workers of engines.

NCCL between GPUs, gloo between CPUs: the code is the same, only torch's backend class and the device of the tensors
differ. The group is separate from the learners' own and from vLLM's, so that it can be formed and left at any time.

No wait here is unbounded, and none is left to the libraries: over NVLink, NCCL waits forever for a dead peer. Every
wait polls, and ends with TransportBroken when the driver stops the group, when the time for the operation is over, or
when the driver itself is gone.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from actors.machine.network import interface_towards
from actors.weights.manifest import Bucket, WeightHeader
from actors.weights.transports.broken import TransportBroken

STOP = "stop"
LOOK_S = 0.2  # seconds between looks for the driver's stop
LONGEST_PAUSE_S = 0.001
DIGEST_BYTES = 64  # of its text, filled with zeros

# Groups that were left. The destructor of one with an unfinished operation waits for the operation's time limit.
_LEFT: list[Any] = []


@dataclass(frozen=True)
class Rendezvous:
    """Where the members of one group meet.

    Args:
        address, port: of the driver's key-value store.
        name: of this group; prefix of its keys.
        world_size: 1 + workers of all engines.
        limit_s: time for meeting, and for each later publish.
    """

    address: str
    port: int
    name: str
    world_size: int
    limit_s: float


class BroadcastGroup:
    """A member of the group. Rank 0 sends; all others receive."""

    def __init__(self, meeting: Rendezvous, rank: int, device: torch.device) -> None:
        """Returns when all members have met and one byte has reached each of them.

        Raises:
            TransportBroken: a member did not come.
        """
        self._rank, self._device, self._limit_s = rank, device, meeting.limit_s
        self._in_flight: list[tuple[Any, torch.Tensor]] = []
        self.allow()
        self._backend: Any = None
        limit = timedelta(seconds=meeting.limit_s)
        with _breaking(self.leave):
            shared = TCPStore(meeting.address, meeting.port, None, False, limit, wait_for_workers=False)
            self._store = PrefixStore(meeting.name, shared)
            self._store.set(f"here/{rank}", "")
            everyone = [f"here/{other}" for other in range(meeting.world_size)]
            self._wait(lambda: bool(self._store.check(everyone)), "the members to meet")
            store = PrefixStore("backend", self._store)
            self._backend = _backend(store, rank, meeting, device, limit)
            self._broadcast(torch.zeros(1, dtype=torch.uint8, device=device))

    def allow(self) -> None:
        """Starts the time for the next publish."""
        self._end = time.monotonic() + self._limit_s

    def send(self, bucket: Bucket) -> None:
        """Returns when the bucket before this one has arrived, so that the next can be packed meanwhile."""
        with _breaking():
            posted = [self._post(bucket.tensor.to(self._device))]
            if bucket.digests:
                posted.append(self._post(_packed(bucket.digests.values()).to(self._device)))
            self.flush()
            self._in_flight = posted

    def flush(self) -> None:
        """Returns when everything sent has arrived."""
        with _breaking():
            for work, _ in self._in_flight:
                self._complete(work)
            self._in_flight = []

    def receive(self, header: WeightHeader) -> Iterator[Bucket]:
        """All buckets of a publish; the next one arrives while the caller uses the last."""
        self.allow()
        endings = header.endings()
        with _breaking():
            upcoming = self._post_bucket(header, 0, endings[0])
        for index in range(header.num_buckets):
            with _breaking():
                (data, names, digests), works = upcoming
                for work in works:
                    self._complete(work)
                if index + 1 < header.num_buckets:
                    upcoming = self._post_bucket(header, index + 1, endings[index + 1])
            rows = digests.cpu().numpy().reshape(-1, DIGEST_BYTES)
            texts = [row.tobytes().rstrip(b"\0").decode("ascii") for row in rows]
            yield Bucket(index, data, dict(zip(names, texts, strict=True)))

    def leave(self) -> None:
        """Gives the group up without waiting for its members."""
        if self._backend is None:
            return
        _LEFT.append(self._backend)
        threading.Thread(target=_abort, args=(self._backend, self._in_flight), name="leave-group", daemon=True).start()
        self._in_flight = []

    def _post_bucket(self, header: WeightHeader, index: int, names: Sequence[str]) -> Any:
        data = torch.empty(header.bucket_size(index), dtype=torch.uint8, device=self._device)
        digests = torch.empty(len(names) * DIGEST_BYTES, dtype=torch.uint8, device=self._device)
        parts = [part for part in (data, digests) if part.numel()]
        return (data, names, digests), [self._post(part)[0] for part in parts]

    def _broadcast(self, tensor: torch.Tensor) -> None:
        self._complete(self._post(tensor)[0])

    def _post(self, tensor: torch.Tensor) -> tuple[Any, torch.Tensor]:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.asyncOp = 0, 0, True
        return self._backend.broadcast([tensor], options), tensor

    def _complete(self, work: Any) -> None:
        self._wait(work.is_completed, "a broadcast")
        work.wait()  # raises the library's error

    def _wait(self, is_done: Callable[[], bool], what: str) -> None:
        pause, look = 1e-5, time.monotonic() + LOOK_S
        while not is_done():
            now = time.monotonic()
            if now > look:
                look = now + LOOK_S
                if self._store.check([STOP]):
                    raise TransportBroken(f"the driver stopped the group: {self._store.get(STOP).decode()}")
            if now > self._end:
                raise TransportBroken(f"rank {self._rank} waited {self._limit_s:g} s for {what}")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)


def _abort(backend: Any, in_flight: list[tuple[Any, torch.Tensor]]) -> None:
    """The buckets in flight live until their operations have ended."""
    backend.abort()
    in_flight.clear()


def _packed(digests: Iterable[str]) -> torch.Tensor:
    rows = b"".join(text.encode("ascii").ljust(DIGEST_BYTES, b"\0") for text in digests)
    return torch.frombuffer(bytearray(rows), dtype=torch.uint8)


def _backend(store: Store, rank: int, meeting: Rendezvous, device: torch.device, limit: timedelta) -> Any:
    interface = interface_towards(meeting.address)
    if device.type == "cpu":
        with _environment(GLOO_SOCKET_IFNAME=interface):
            return dist.ProcessGroupGloo(store, rank, meeting.world_size, limit)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = limit
    # Otherwise torch's watchdog ends this process when a peer is lost.
    with _environment(NCCL_SOCKET_IFNAME=interface, TORCH_NCCL_ASYNC_ERROR_HANDLING="0"):
        backend = dist.ProcessGroupNCCL(store, rank, meeting.world_size, options)
        backend.eager_connect_single_device(device)
        return backend


@contextlib.contextmanager
def _environment(**values: str | None) -> Iterator[None]:
    """Sets variables that are not None and not yet set, for the duration of the block."""
    mine = {name: value for name, value in values.items() if value is not None and name not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for name in mine:
            del os.environ[name]


@contextlib.contextmanager
def _breaking(leave: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Turns errors of torch's store and backends into TransportBroken: gloo and NCCL raise bare RuntimeErrors.

    Args:
        leave: called if the body fails.
    """
    try:
        yield
    except (RuntimeError, TransportBroken) as error:
        leave()
        if isinstance(error, TransportBroken):
            raise
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise TransportBroken(f"the group of policy and engines is broken: {text[0]}") from error
