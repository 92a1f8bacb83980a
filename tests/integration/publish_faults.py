"""`rlhf run` whose engines die in chosen moments of publishes:
`python -m tests.integration.publish_faults FOLDER [arguments of run]`.

FOLDER/plan.json lists the phases in which an engine kills itself, one for each publish from the first; "sampling" comes
after its publish. The driver arms a phase when a publish begins; the first engine that gets there strikes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

import jobs.pipeline
from actors.roles.rollout import RolloutWorker
from actors.weights.transports.group import Rendezvous
from actors.weights.transports.receiver import Parcel
from jobs import run as rl
from jobs.stages.work import wiring
from orchestrator.types import ShardRequest
from orchestrator.watching.telemetry import Telemetry

PHASES = ("rendezvous", "start", "update", "sampling", "finish", "confirm")


class DyingRollout(RolloutWorker):
    """Kills itself in the armed phase."""

    folder: Path  # Ray copies this class to the actors with its attributes, because it is in __main__

    def __init__(self, context: Any, cache: Path) -> None:
        super().__init__(context, cache)
        self._num_received = 0
        engine: Any = self._engine
        (transfer,) = engine._llm.collective_rpc(lambda worker: worker.weight_transfer_engine)
        transfer.compare = self._before("confirm", transfer.compare)
        transfer.finish_weight_update = self._before("finish", transfer.finish_weight_update)
        receive = engine.receive_bucket

        def dying_receive(parcel: Parcel) -> None:
            if self._num_received == 1:
                self._strike("update")
            receive(parcel)
            self._num_received += 1

        engine.receive_bucket = dying_receive

    def generate(self, request: ShardRequest) -> tuple[pa.Table, dict[str, Any]]:
        self._strike("sampling")
        return super().generate(request)

    def join(self, meeting: Rendezvous, first_rank: int) -> None:
        self._strike("rendezvous")
        super().join(meeting, first_rank)

    def begin_update(self, header: Any) -> None:
        self._num_received = 0
        super().begin_update(header)
        self._strike("start")

    def _before(self, phase: str, work: Callable[[], Any]) -> Callable[[], Any]:
        def dying() -> Any:
            self._strike(phase)
            return work()

        return dying

    def _strike(self, phase: str) -> None:
        try:
            os.rename(self.folder / f"armed.{phase}", self.folder / f"struck.{phase}")
        except FileNotFoundError:
            return
        os.kill(os.getpid(), signal.SIGKILL)


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
    Arming.folder = DyingRollout.folder = Path(sys.argv.pop(1))
    Arming.plan = json.loads((Arming.folder / "plan.json").read_text(encoding="utf-8"))
    jobs.pipeline.Telemetry = Arming  # type: ignore[misc]
    wiring.RolloutWorker = DyingRollout  # type: ignore[misc]
    rl.typer.run(rl.main)
