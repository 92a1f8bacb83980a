"""A stage without rollouts on Ray Train: it starts, places, retries and ends the workers; their progress comes through
a file, because a report of Ray Train stays in its controller until the end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import ray
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer

from actors.groups.cluster import alive_nodes, environment
from orchestrator.errors import CapacityError, DeadlineExceeded, RlhfError, RoleError

PROGRESS_FILE = "progress.jsonl"
_POLL_S = 0.25
# An empty loop of one worker took 10.0 s with Ray Train's own settings and 7.7 s with these.
_QUICK = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "RAY_TRAIN_METRICS_ENABLED": "0"}

Progress = Mapping[str, float]


@dataclass(frozen=True)
class Workers:
    """Args:
    role: names the workers in errors.
    count, threads, gpus: workers, and CPU threads and GPUs of one.
    room_s: how long to wait for their resources.
    collective_s: deadline of every collective.
    """

    role: str
    count: int
    threads: int
    gpus: float
    room_s: float
    collective_s: float


class Restarted(Exception):
    """Ray Train has started the workers again; they begin from the first step."""


class TrainRun:
    """A training that has been started. It runs on a thread of its own, because Ray Train only has a blocking call.

    The thread is a daemon: a driver that is told to stop does not wait for it, and the workers end with the driver.

    Args:
        loop: runs on every worker; returns what `result` returns on rank 0, or an RlhfError, for which Ray Train does
            not try again. Rank 0 appends a line of JSON per step to `folder`/progress.jsonl, a new file per try.
        config: argument of `loop`.
        folder: exists; shared by driver and workers.
    """

    def __init__(
        self, loop: Callable[[Mapping[str, Any]], Any], config: Mapping[str, Any], workers: Workers, folder: Path
    ) -> None:
        self._role = workers.role
        self._lines = _Lines(folder / PROGRESS_FILE)
        self._event_loop = asyncio.get_running_loop()
        self._outcome: asyncio.Future[Any] = self._event_loop.create_future()
        trainer = _trainer(loop, config, workers, folder)
        threading.Thread(target=self._run, args=(trainer,), name="ray-train", daemon=True).start()

    async def next_line(self, timeout_s: float) -> Progress:
        """The next step's line.

        Raises:
            Restarted: the lines begin again.
            DeadlineExceeded: no line came in time.
            RlhfError: what ended the training.
        """
        deadline = monotonic() + timeout_s
        while True:
            ended = self._outcome.done()
            line = self._lines.next()
            if line is not None:
                return line
            if ended:
                await self.result(0.0)
                raise RoleError(self._role, 0, "train", "it ended before its last step")
            if monotonic() > deadline:
                raise DeadlineExceeded(self._role, 0, "train", f"no step was finished in {timeout_s:g} s")
            await asyncio.sleep(_POLL_S)

    async def result(self, timeout_s: float) -> Any:
        """What rank 0 returned; raises what ended the training, or DeadlineExceeded."""
        done, _ = await asyncio.wait([self._outcome], timeout=timeout_s)
        if not done:
            raise DeadlineExceeded(self._role, 0, "evaluate and save", f"it was not done in {timeout_s:g} s")
        outcome = self._outcome.result()
        if isinstance(outcome, RlhfError):
            raise outcome
        return outcome

    def _run(self, trainer: TorchTrainer) -> None:
        outcome: Any = RoleError(self._role, 0, "train", "Ray Train ended without an answer; see the driver's log")
        try:
            fitted: Any = trainer.fit()
            outcome = fitted.return_value
        except (TrainingFailedError, ray.exceptions.RayError) as error:
            outcome = failure(self._role, error)
        finally:
            with contextlib.suppress(RuntimeError):  # nobody waits any more: the driver's loop is closed
                self._event_loop.call_soon_threadsafe(self._outcome.set_result, outcome)


def failure(role: str, error: Exception) -> RlhfError:
    """A failed training as an error of ours."""
    if isinstance(error, WorkerGroupError):
        rank, cause = min(error.worker_failures.items(), key=lambda item: item[0])
        return RoleError(role, rank, "train", f"{_headline(cause)} (Ray Train tried twice)")
    if isinstance(error, ControllerError) and "timed out" in str(error):
        return CapacityError(
            f"the cluster did not free the resources of the {role} workers within placement.wait_s; other jobs hold "
            f"them (`ray status` shows which). Wait for them, or lower {role}.ranks or {role}.cpus_per_rank."
        )
    return RoleError(role, 0, "start", _headline(error))


def _headline(error: BaseException) -> str:
    """The line of a message that says most: its last one, because Ray puts the trace before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _trainer(
    loop: Callable[[Mapping[str, Any]], Any], config: Mapping[str, Any], workers: Workers, folder: Path
) -> TorchTrainer:
    _set_defaults(workers.room_s)
    resources = {"CPU": float(workers.threads)} | ({"GPU": workers.gpus} if workers.gpus else {})
    on_gpu = workers.gpus > 0
    # Ray's annotations are those of its older Train; these keys are of the present one.
    failures: dict[str, Any] = {"max_failures": 1, "controller_failure_limit": 0}
    run: dict[str, Any] = {"worker_runtime_env": {"env_vars": environment(workers.threads, on_gpu=on_gpu)}}
    train_loop: Any = loop
    return TorchTrainer(
        train_loop,
        train_loop_config=dict(config),
        torch_config=TorchConfig(timeout_s=math.ceil(workers.collective_s)),
        scaling_config=ScalingConfig(num_workers=workers.count, use_gpu=on_gpu, resources_per_worker=resources),
        run_config=RunConfig(
            name="train",
            storage_path=str(folder / "ray-train"),
            failure_config=FailureConfig(**failures),
            **run,
        ),
    )


def _set_defaults(room_s: float) -> None:
    """Settings of Ray Train that it reads from the driver's environment; what is set already stays."""
    # Its own default asks for room a minute at a time, for ever.
    defaults = _QUICK | {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(room_s)}
    if len(alive_nodes()) == 1:
        defaults["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


class _Lines:
    """Lines of JSON that somebody else appends, as they come."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def next(self) -> Progress | None:
        """The next whole line; None: not yet. Raises Restarted when the file begins anew."""
        try:
            with self._path.open("rb") as stream:
                size = stream.seek(0, os.SEEK_END)
                stream.seek(self._offset)
                line = stream.readline()
        except FileNotFoundError:
            size, line = 0, b""
        if size < self._offset:
            self._offset = 0
            raise Restarted
        if not line.endswith(b"\n"):
            return None
        self._offset += len(line)
        progress: Progress = json.loads(line)
        return progress
