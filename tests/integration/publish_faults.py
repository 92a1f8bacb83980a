"""`rlhf run` whose engines die in chosen moments of publishes, and actors that alter weights:
`python -m tests.integration.publish_faults [arguments of run]`.

The folder of the config's key run.cache holds plan.json: the phases in which an engine kills itself, one for each
publish from the first. The driver arms a phase when a publish begins; the first engine that gets there strikes.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import jobs.pipeline
from actors.roles.rollout import RolloutWorker
from actors.weights.cpu import BucketTransferEngine
from actors.weights.digest import digest
from actors.weights.manifest import Bucket
from actors.weights.readback import Reader
from actors.weights.sender import PublishingPolicy
from actors.weights.transports.group import Rendezvous
from actors.weights.transports.receiver import Parcel, Receiver
from jobs import run as rl
from jobs.stages.work import wiring
from orchestrator.watching.telemetry import Telemetry

PHASES = ("rendezvous", "start", "update", "finish", "confirm")


class DyingRollout(RolloutWorker):
    """Kills itself in the armed phase."""

    def __init__(self, context: Any, cache: Path) -> None:
        super().__init__(context, cache)
        self._folder, self._num_received = cache, 0
        compare, finish = BucketTransferEngine.compare, BucketTransferEngine.finish_weight_update

        def dying_compare(engine: BucketTransferEngine) -> int:
            self._strike("confirm")
            return compare(engine)

        def dying_finish(engine: BucketTransferEngine) -> None:
            self._strike("finish")
            finish(engine)

        setattr(BucketTransferEngine, "compare", dying_compare)  # noqa: B010  mypy forbids assigning to methods
        setattr(BucketTransferEngine, "finish_weight_update", dying_finish)  # noqa: B010
        engine: Any = self._engine
        receive = engine.receive_bucket

        def dying_receive(parcel: Parcel) -> None:
            if self._num_received == 1:
                self._strike("update")
            receive(parcel)
            self._num_received += 1

        engine.receive_bucket = dying_receive

    def join(self, meeting: Rendezvous, first_rank: int) -> None:
        self._strike("rendezvous")
        super().join(meeting, first_rank)

    def begin_update(self, header: Any) -> None:
        self._num_received = 0
        super().begin_update(header)
        self._strike("start")

    def _strike(self, phase: str) -> None:
        try:
            os.rename(self._folder / f"armed.{phase}", self._folder / f"struck.{phase}")
        except FileNotFoundError:
            return
        os.kill(os.getpid(), signal.SIGKILL)


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
                return Bucket(bucket.index, data, bucket.checksums)
            return bucket

        setattr(Receiver, "untouched", take)  # noqa: B010
        setattr(Receiver, "take", altering if name else take)  # noqa: B010

    def digests(self) -> Mapping[str, str]:
        """By tensor, the digest of what is read back from its layers."""
        return self._engine._llm.collective_rpc(_digests)[0]  # type: ignore[attr-defined]


def _digests(worker: Any) -> Mapping[str, str]:
    engine: BucketTransferEngine = worker.weight_transfer_engine
    reader, found = Reader(engine.model), {}
    assert engine._unpacker is not None
    shapes = {spec.name: spec.shape for spec in engine._unpacker.header.tensors}
    for name, places in engine._places.items():
        for place in places:
            for way in reader.ways(place.module, place.parameter):
                held = place.held.of(reader.read(place.module, place.parameter, way))
                found[name] = digest(held.reshape(shapes[name]), name).hex
    return found


class AlteringPolicy(PublishingPolicy):
    """Gathers other weights than its ranks hold, if told to."""

    def alter(self, name: str | None) -> None:
        learner: Any = self.learner
        full_weights = vars(learner).get("untouched", learner.full_weights)
        learner.untouched = full_weights

        def altering(*args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
            for found, tensor in full_weights(*args, **kwargs):
                if found == name and tensor.numel():
                    tensor.view(-1)[-1] += 1
                yield found, tensor

        learner.full_weights = altering if name else full_weights

    def sums(self) -> Mapping[str, str]:
        """The digests of the parts of all ranks."""
        return {name: found.hex for name, found in self.digests_of_parts().items()}


class Arming(Telemetry):
    """Arms the next phase of the plan at each publish."""

    folder: Path
    plan: list[str]
    _published = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if name == "publish":
            if self._published < len(self.plan):
                (self.folder / f"armed.{self.plan[self._published]}").touch()
            self._published += 1
        with super().phase(name):
            yield


def plan_in(folder: Path, phases: list[str]) -> None:
    (folder / "plan.json").write_text(json.dumps(phases), encoding="utf-8")


if __name__ == "__main__":
    Arming.folder = Path(os.environ["PUBLISH_FAULTS"])
    Arming.plan = json.loads((Arming.folder / "plan.json").read_text(encoding="utf-8"))
    jobs.pipeline.Telemetry = Arming  # type: ignore[misc]
    wiring.RolloutWorker = DyingRollout  # type: ignore[misc]
    rl.typer.run(rl.main)
