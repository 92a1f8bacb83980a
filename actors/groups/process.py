"""The calls that every actor process answers in addition to those of its role."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from actors.machine.allocator import keep_large_blocks, trim_gpu
from actors.watching.metrics import ActorMetrics
from orchestrator.garbage import collect_as_usual, collect_seldom
from orchestrator.types import Handle


@dataclass(frozen=True, eq=False)
class Several:
    """An argument that is replaced by the list of its handles' values."""

    handles: Sequence[Handle]


@dataclass(frozen=True)
class Whereabouts:
    """The place of a process: Ray's node id, the node's address, and the process id."""

    node_id: str
    address: str
    pid: int


class Process:
    """Mixed into every worker class by `as_actor`."""

    _metrics: ActorMetrics | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        collect_seldom()
        super().__init__(*args, **kwargs)
        collect_as_usual()

    def ready(self) -> Whereabouts:
        """Answers after the constructor has finished. Later computations keep their large memory blocks; a GPU gets
        back what only the start took."""
        keep_large_blocks()
        self.trim()
        node_id = ray.get_runtime_context().get_node_id()
        return Whereabouts(node_id, str(ray.util.get_node_ip_address()), os.getpid())

    def trim(self) -> None:
        """Returns the GPU memory that this process keeps for its next computation."""
        trim_gpu()

    def serve(self, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Calls a method of the worker. Fetches handles among its arguments here, not in the caller."""
        return getattr(self, method)(*map(_fetch, args), **kwargs)

    def serve_bulk(self, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """Calls a method that returns bulk, or (bulk, summary).

        Two results, so that the caller can get the second and leave the first on this node.
        """
        result = self.serve(method, args, kwargs)
        return result if isinstance(result, tuple) else (result, None)

    def report(self, run_id: str, role: str, rank: int, version: int) -> int:
        """Sends this process's gauges to the node's metrics agent; returns its resident bytes."""
        if self._metrics is None:
            self._metrics = ActorMetrics(run_id, role, rank)
        self._metrics.set_weights_version(version)
        return self._metrics.report_memory()


def as_actor(worker: type[Any]) -> Any:
    """The Ray class of a worker class. It has the same name and also answers the calls of `Process`."""
    return ray.remote(type(worker.__name__, (Process, worker), {}))


def _fetch(argument: Any) -> Any:
    if isinstance(argument, Several):
        return ray.get(list(argument.handles))
    return ray.get(argument) if isinstance(argument, ray.ObjectRef) else argument


def free_port() -> int:
    """A free TCP port of this node."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])
