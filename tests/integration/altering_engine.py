"""An engine that alters what it receives."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from actors.roles.rollout import RolloutWorker
from actors.weights.cpu import BucketTransferEngine
from actors.weights.digest import digest
from actors.weights.manifest import Bucket
from actors.weights.packed import PackedWeight, packed_weight
from actors.weights.readback import Reader
from actors.weights.transports.receiver import Parcel, Receiver
from tests.integration.engine_scenarios import behaviour


class AlteringRollout(RolloutWorker):
    """Alters one bit of what it receives, if told to, and can say what its layers compute with."""

    altered: str | None = None

    def alter(self, name: str | None) -> None:
        """Flips a bit of each arriving copy of this tensor; None: of none."""
        take = vars(Receiver).get("untouched", Receiver.take)
        header: Any = None

        def altering(receiver: Receiver, parcel: Parcel) -> Bucket:
            bucket = take(receiver, parcel)
            nonlocal header
            header = receiver._header
            number = [spec.name for spec in header.tensors].index(name) if name else -1
            at = header.start(number) - bucket.index * header.bucket_bytes if name else -1
            if 0 <= at < bucket.num_bytes:
                data = bucket.tensor.clone()
                data[at] ^= 4
                return Bucket(bucket.index, data, bucket.digests)
            return bucket

        setattr(Receiver, "untouched", take)  # noqa: B010
        setattr(Receiver, "take", altering if name else take)  # noqa: B010

    def logprobs(self) -> list[float]:
        """Of fixed texts."""
        return self.behaviour()[0]

    def behaviour(self) -> tuple[list[float], list[list[int]]]:
        engine: Any = self._engine
        return behaviour(engine)

    def damage(self, rank: int, module: str) -> None:
        """One worker changes an element of a weight before it reads back the next publish."""
        self._engine._llm.collective_rpc(_damage, args=(rank, module))  # type: ignore[attr-defined]

    def digests(self) -> Mapping[str, str]:
        """By tensor, the digest of what is read back from its layers; several if its places differ."""
        return self._engine._llm.collective_rpc(_digests)[0]  # type: ignore[attr-defined]


def _damage(worker: Any, rank: int, module: str) -> None:
    engine: BucketTransferEngine = worker.weight_transfer_engine
    finish = engine.finish_weight_update

    def damaging() -> None:
        finish()
        engine.finish_weight_update = finish  # type: ignore[method-assign]
        if engine.parallel_config.rank == rank:
            layer = engine.model.get_submodule(module)
            packed = packed_weight(layer)
            if packed is None:
                layer.weight.data[-1, -1] += 1
            else:
                weight = packed.read()
                weight[-1, -1] += 1
                packed._packed, packed._panels = PackedWeight(weight.t())._packed, None

    engine.finish_weight_update = damaging  # type: ignore[method-assign]


def _digests(worker: Any) -> Mapping[str, str]:
    engine: BucketTransferEngine = worker.weight_transfer_engine
    reader = Reader(engine.model)
    found: dict[str, set[str]] = defaultdict(set)
    assert engine._unpacker is not None
    shapes = {spec.name: spec.shape for spec in engine._unpacker.header.tensors}
    for name, places in engine._places.items():
        for place in places:
            for way in reader.ways(place.module, place.parameter):
                held = place.held.of(reader.read(place.module, place.parameter, way))
                found[name].add(digest(held.reshape(shapes[name]), name).hex)
    return {name: " ".join(sorted(digests)) for name, digests in found.items()}
