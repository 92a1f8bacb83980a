"""Weight transfer to an engine through vLLM's weight-transfer API, in buckets that any transport may bring.

vLLM calls the engine in this order, for every publish: `init_transfer_engine` (the header), `start_weight_update`,
`update_weights` once per bucket, `finish_weight_update`. Our own `compare` comes last.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import nn
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from actors.weights.conversion import NamedTensor
from actors.weights.experts import pack_again
from actors.weights.manifest import TensorSpec, Unpacker, Verify, WeightHeader
from actors.weights.packed import packed_weight
from actors.weights.places import Places, checkpoint_form, locate
from actors.weights.readback import Reader
from actors.weights.taken import Taken, views_of
from actors.weights.transports.receiver import Parcel, Receiver
from actors.weights.verify import Verifier
from actors.weights.write import Writer, obstacle
from orchestrator.errors import PublishError


@dataclass
class BucketInitInfo(WeightTransferInitInfo):
    """One publish: what is sent and how it is verified (see Verifier)."""

    header: WeightHeader
    verify: Verify
    seed: int


@dataclass
class BucketUpdateInfo(WeightTransferUpdateInfo):
    parcel: Parcel


class BucketTransferEngine(WeightTransferEngine[BucketInitInfo, BucketUpdateInfo]):
    """Writes buckets to the places of their tensors, or loads them through vLLM's layerwise reload if the model keeps
    more than these (`obstacle`); holds one bucket and one layer at a time."""

    init_info_cls = BucketInitInfo
    update_info_cls = BucketUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unpacker: Unpacker | None = None
        self._verifier: Verifier | None = None
        self._half_loaded = False
        self._form = checkpoint_form(self.vllm_config)
        self._places: Places = {}
        self._refusal: PublishError | None = None
        try:
            self._places = locate(self.model, self._form)
        except PublishError as error:
            self._refusal = error
        self._reader = Reader(self.model)
        self.obstacle = obstacle(self.model, self._places)
        self._writer = Writer(self.model, self._places, self._reader) if self.obstacle is None else None
        # vLLM's layerwise reload holds tensors until their layer is complete.
        self.receiver = Receiver(self.device, keeps=self._writer is None)
        self.seconds = dict.fromkeys(("receive", "apply", "verify"), 0.0)

    def taken(self) -> Taken:
        """What this worker keeps of the trainer's tensors. Called before the first publish.

        Raises:
            PublishError: see `locate`. Not raised when the worker starts, because vLLM would log it and raise another.
        """
        if self._refusal is not None:
            raise self._refusal
        return Taken(dict(self._form.specs), self._form.buffers, views_of(self._places))

    def init_transfer_engine(self, init_info: BucketInitInfo) -> None:
        self._verifier = Verifier(self._reader, self._places, mode=init_info.verify, seed=init_info.seed)
        self._unpacker = Unpacker(init_info.header, proved_later=self._verifier.proves, room=self._room)
        self.receiver.begin(init_info.header)
        self.seconds = dict.fromkeys(self.seconds, 0.0)

    def start_weight_update(self) -> None:
        if self._half_loaded:
            # After an interrupted update, layers would wait for its rest and mix two versions.
            finalize_layerwise_reload(self.model, self.model_config)
        if self._writer is not None:
            self._writer.begin()
            return
        self._half_loaded = True
        pack_again(self.model)
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: BucketUpdateInfo) -> None:
        """Raises PublishError, without applying the bucket, if bytes differ from the trainer's; those that `compare`
        proves itself are not read twice. Raises TransportBroken."""
        if self._unpacker is None or self._verifier is None:
            raise PublishError("a bucket arrived before its header; call init_weight_transfer_engine first.")
        started = perf_counter()
        bucket = self.receiver.take(update_info.parcel)
        tensors = self._unpacker.add(bucket)
        received = perf_counter()
        for name, tensor in tensors:
            self._verifier.expect(name, tensor, bucket.digests[name])
        expected = perf_counter()
        self._apply(tensors)
        self.seconds["receive"] += received - started
        self.seconds["verify"] += expected - received
        self.seconds["apply"] += perf_counter() - expected

    def _room(self, spec: TensorSpec) -> torch.Tensor | None:
        """A tensor that is compared when it is received must not be used before."""
        is_proved = self._verifier is not None and self._verifier.proves(spec)
        return self._writer.room(spec) if is_proved and self._writer is not None else None

    def _apply(self, tensors: list[NamedTensor]) -> None:
        if self._writer is None:
            self.model.load_weights(self._form.convert(tensors))
            return
        for name, tensor in tensors:
            self._writer.write(name, tensor)

    def finish_weight_update(self) -> None:
        started = perf_counter()
        self.receiver.finish()
        if self._writer is None:
            finalize_layerwise_reload(self.model, self.model_config)
        else:
            self._writer.finish()
        refresh_tied_layers(self.model, self._places)
        self._half_loaded = False
        self.seconds["apply"] += perf_counter() - started

    def compare(self) -> int:
        """Returns the number of tensors read back and found equal to the sent ones.

        Raises:
            PublishError: buckets are missing, or layers (named) compute with other weights.
        """
        if self._unpacker is None or self._verifier is None or not self._unpacker.done:
            raise PublishError("the update was finished before all of its buckets arrived; publish again.")
        started = perf_counter()
        num_compared = self._verifier.compare()
        self.seconds["verify"] += perf_counter() - started
        return num_compared

    def shutdown(self) -> None:
        self._unpacker = self._verifier = None
        self.receiver.leave()


def refresh_tied_layers(model: nn.Module, places: Places) -> None:
    """Renews the packed copies of tied layers. They receive no weights, so the copies are stale after an update."""
    modules = dict(model.named_modules())
    for name in {place.module for many in places.values() for place in many if place.tied}:
        module = modules[name]
        packed = packed_weight(module)
        if packed is not None and packed.height is not None:
            packed.write(0, module.weight.detach())
        elif hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)
