"""Weight transfer to engines on GPUs with vLLM's backends: NCCL between separate GPUs, CUDA IPC on shared ones.

All ranks of the trainer call `open_trainer` once, and `send_weights()` of its result for every publish. Rank 0
drives the engines (actors.engines.vllm_engine.DeviceVllmEngine) through `EngineFanOut`, and then has each confirm its
update with the source's header and checksums. `VerifiedNccl` and `VerifiedIpc` are vLLM's engines with a read-back: the
parameters' bytes, hashed, against the checksums that `ChecksummedSource` took while the weights left the trainer.

Written against vLLM 0.32's source. None of it has run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from vllm.config import VllmConfig
from vllm.distributed.weight_transfer import ParamMeta, TrainerWeightTransferEngine, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo, IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLWeightTransferEngine

from actors.weights.digest import digest
from actors.weights.manifest import TensorSpec, Verify, WeightHeader
from actors.weights.places import checkpoint_form, locate
from actors.weights.readback import Reader
from actors.weights.verify import Verifier
from orchestrator.errors import PublishError

Placement = Literal["separate", "colocated"]


class _Verified:
    """Adds `compare` to one of vLLM's engines. Needs whole tensors in every worker: tensor parallel size 1."""

    model: torch.nn.Module
    vllm_config: VllmConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._form = checkpoint_form(self.vllm_config)
        if not self._form.is_same:
            raise PublishError(
                f"{self.vllm_config.model_config.model}: vLLM loads other tensors than the trainer holds, and engines "
                "on GPUs are sent the trainer's; set rollout.engine=hf."
            )
        self._places = locate(self.model, self._form)

    def compare(self, header: WeightHeader, checksums: Mapping[str, str], verify: Verify) -> int:
        """Returns the number of parameters read back. Raises PublishError, which names those that differ from the
        trainer's or that only one side has."""
        verifier = Verifier(Reader(self.model), self._places, mode=verify, seed=0)
        verifier.check_names((spec.name for spec in header.tensors), optional=self._form.buffers)
        for spec in header.tensors:
            verifier.expect_checksum(spec, checksums[spec.name])
        return verifier.compare()


class VerifiedNccl(_Verified, NCCLWeightTransferEngine):
    pass


class VerifiedIpc(_Verified, IPCWeightTransferEngine):
    pass


class ChecksummedSource(WeightSource):
    """A source of full weights that keeps the checksums of its latest pass."""

    def __init__(self, header: WeightHeader, weights: Callable[[], Iterator[tuple[str, torch.Tensor]]]) -> None:
        self.header, self._weights = header, weights
        self.checksums: dict[str, str] = {}

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(spec.name, spec.torch_dtype, spec.shape) for spec in self.header.tensors]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        specs: Mapping[str, TensorSpec] = {spec.name: spec for spec in self.header.tensors}
        for name, tensor in self._weights():
            sent = tensor.to(specs[name].torch_dtype)
            self.checksums[name] = digest(sent, name).hex
            yield name, sent


class EngineClient(Protocol):
    """One engine, for calls from the trainer's rank 0, which return when the engine has finished."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: Any) -> None: ...

    def finish_weight_update(self) -> None: ...


@dataclass(frozen=True)
class EngineFanOut:
    """All engines as one (vLLM's VLLMWeightSyncClient). Calls run concurrently, because under NCCL they wait for each
    other."""

    engines: Sequence[EngineClient]
    workers_per_engine: int

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        def init(number: int, engine: EngineClient) -> None:
            info = dict(init_info)
            if "rank_offset" in info:
                info["rank_offset"] += number * self.workers_per_engine
            engine.init_weight_transfer_engine(info)

        self._all(init)

    def start_weight_update(self) -> None:
        self._all(lambda _, engine: engine.start_weight_update())

    def update_weights(self, update_info: Any) -> None:
        self._all(lambda _, engine: engine.update_weights(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:  # noqa: ARG002 (vLLM's signature)
        self._all(lambda _, engine: engine.finish_weight_update())

    def _all(self, call: Callable[[int, EngineClient], None]) -> None:
        with ThreadPoolExecutor(len(self.engines)) as pool:
            for done in [pool.submit(call, number, engine) for number, engine in enumerate(self.engines)]:
                done.result()


@dataclass(frozen=True)
class Rendezvous:
    """Address at which the trainer's rank 0 listens for the engines' workers."""

    address: str
    port: int


def open_trainer(
    placement: Placement, source: ChecksummedSource, client: EngineFanOut, *, rank: int, rendezvous: Rendezvous
) -> TrainerWeightTransferEngine[Any]:
    """Connects trainer and engines. Called on every trainer rank; colocated trainers ignore the rendezvous."""
    if placement == "colocated":
        ipc = IPCTrainerInitInfo(rank=rank, packed=True)
        return WeightTransferTrainerFactory.trainer_init(ipc, client=client, source=source)
    world_size = 1 + len(client.engines) * client.workers_per_engine
    nccl = NCCLTrainerInitInfo(rendezvous.address, rendezvous.port, world_size, rank=rank)
    return WeightTransferTrainerFactory.trainer_init(nccl, client=client, source=source)
