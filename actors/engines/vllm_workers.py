"""The workers of one vLLM engine, as a publish sees them: one in the engine's process, or with tensor parallelism one
process for each part of the layers. All get the same calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm import LLM

from actors.weights.cpu import BucketTransferEngine
from actors.weights.manifest import Verify, WeightHeader, check_names
from actors.weights.taken import Taken, require_all_taken
from actors.weights.transports.group import Rendezvous
from actors.weights.transports.receiver import Parcel
from actors.weights.transports.shared import device_id
from orchestrator.errors import RlhfError


class Workers:
    """Raises PublishError: a publish to this model could not be proved; see `locate` and `require_all_taken`."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        taken: list[Taken] = self._call(_taken)
        self._needed, self._optional = require_all_taken(taken), taken[0].buffers

    def device_ids(self) -> list[str]:
        """Equal for processes that share a device."""
        return self._call(_device_id)

    def join(self, meeting: Rendezvous, first_rank: int) -> None:
        """Raises TransportBroken."""
        self._call(_join, meeting=meeting, first_rank=first_rank)

    def begin(self, header: WeightHeader, verify: Verify, seed: int) -> None:
        """Raises PublishError, which names tensors that only the model or only the trainer has."""
        check_names((spec.name for spec in header.tensors), needed=self._needed, optional=self._optional)
        self._call(_abandon_session)
        self._call("init_weight_transfer_engine", init_info={"header": header, "verify": verify, "seed": seed})
        self._call("start_weight_update")

    def receive(self, parcel: Parcel) -> None:
        """Raises PublishError, TransportBroken."""
        self._call("update_weights", update_info={"parcel": parcel})

    def finish(self) -> tuple[int, dict[str, float]]:
        """Returns the number of tensors that each worker read back, as far as it keeps them, and the slowest worker's
        seconds by part. Raises PublishError."""
        self._call("finish_weight_update")
        compared = self._call(_compare)
        slowest = {part: max(seconds[part] for _, seconds in compared) for part in compared[0][1]}
        return min(count for count, _ in compared), slowest

    def _call(self, work: str | Callable[..., Any], **arguments: Any) -> list[Any]:
        """The results of all workers. Raises the first RlhfError of a worker."""
        results: list[_Result] = self._llm.collective_rpc(_attempt, kwargs={"work": work, "arguments": arguments})
        for result in results:
            if result.error is not None:
                raise result.error
        return [result.value for result in results]


@dataclass(frozen=True)
class _Result:
    """Of an error in another process, raised or returned as it is, vLLM keeps only the text."""

    value: Any = None
    error: RlhfError | None = None


def _attempt(worker: Any, work: str | Callable[..., Any], arguments: Mapping[str, Any]) -> _Result:
    try:
        return _Result(getattr(worker, work)(**arguments) if isinstance(work, str) else work(worker, **arguments))
    except RlhfError as error:
        return _Result(error=error)


def _device_id(worker: Any) -> str:
    return device_id(_transfer(worker).device)


def _taken(worker: Any) -> Taken:
    return _transfer(worker).taken()


def _abandon_session(worker: Any) -> None:
    """Closes the session of an interrupted update; the transfer engine resets the layers at the next start."""
    # vLLM passes the worker in a wrapper that forwards reads of attributes but not writes.
    getattr(worker, "worker", worker)._weight_update_active = False


def _join(worker: Any, meeting: Rendezvous, first_rank: int) -> None:
    engine = _transfer(worker)
    engine.receiver.join(meeting, first_rank + engine.parallel_config.rank)


def _compare(worker: Any) -> tuple[int, dict[str, float]]:
    engine = _transfer(worker)
    return engine.compare(), engine.seconds


def _transfer(worker: Any) -> BucketTransferEngine:
    engine: BucketTransferEngine = worker.weight_transfer_engine
    return engine
