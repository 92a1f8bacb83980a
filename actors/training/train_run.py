"""Training without rollouts on Ray Train, which starts, places, restarts and ends the workers. Their progress comes
through a file, because a report of Ray Train stays in its controller until the end (docs/adr/0012-training.md)."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import pickle
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer

from actors.groups.cluster import alive_nodes, environment
from actors.groups.ray_errors import worker_error
from actors.learning import distributed
from actors.learning.distributed import Group, on_rank_0
from actors.training.trainer import Trainer, Training
from actors.training.work import CONTINUES_AFTER, PROGRESS_FILE, Lines, WorkFolder
from orchestrator.errors import CapacityError, DeadlineExceeded, RlhfError, RoleError, RoleLost, StorageError

_POLL_S = 0.25
# An empty loop of one worker took 10.0 s with Ray Train's own settings and 7.7 s with these.
_QUICK = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "RAY_TRAIN_METRICS_ENABLED": "0"}

Progress = Mapping[str, float]


@dataclass(frozen=True)
class Workers:
    """Args:
    role: names the workers in errors.
    count, threads, gpus: workers, and CPU threads and GPUs of one.
    room_s: time limit for their resources.
    collective_s: deadline of each collective.
    restarts: maximum number of restarts after lost workers.
    """

    role: str
    count: int
    threads: int
    gpus: float
    room_s: float
    collective_s: float
    restarts: int


class TrainRun:
    """A running training, on a separate thread because Ray Train's call blocks.

    The thread is a daemon: a driver that stops does not wait for it, and the workers end with the driver.

    Args:
        config: argument of `train_worker`: references to a `training` (Training) and to its `data` in Ray's store.
        folder: the work folder, see work.py; shared by driver and workers.
        on_start: called with a step number whenever workers start to learn after that step.
    """

    def __init__(
        self, config: Mapping[str, Any], workers: Workers, folder: Path, on_start: Callable[[int], None]
    ) -> None:
        self._role, self._on_start = workers.role, on_start
        progress = folder / PROGRESS_FILE
        self._progress, self._num_steps = Lines(progress), 0
        self._earlier_bytes = progress.stat().st_size if progress.exists() else 0  # by workers of earlier drivers
        self._event_loop = asyncio.get_running_loop()
        self._outcome: asyncio.Future[Any] = self._event_loop.create_future()
        trainer = _trainer(config, workers, folder)
        threading.Thread(target=self._run, args=(trainer,), name="ray-train", daemon=True).start()

    async def next_step(self, timeout_s: float) -> Progress:
        """Metrics of the next optimizer step. Returns each step once and in order, including steps of earlier drivers,
        however often workers repeat them.

        Raises:
            DeadlineExceeded: the workers reported nothing for `timeout_s`.
            RlhfError: the error that ended the training.
        """
        deadline = monotonic() + timeout_s
        while True:
            ended = self._outcome.done()
            while (line := self._next_line()) is not None:
                deadline = monotonic() + timeout_s
                if line.get("step") == self._num_steps:
                    self._num_steps += 1
                    metrics: Progress = line["metrics"]
                    return metrics
            if ended:
                await self.result(0.0)
                raise RoleError(self._role, 0, "train", "it ended before its last step")
            if monotonic() > deadline:
                raise DeadlineExceeded(self._role, 0, "train", f"no step was finished in {timeout_s:g} s")
            await asyncio.sleep(_POLL_S)

    async def result(self, timeout_s: float) -> Any:
        """Rank 0's result. Raises errors as `next_step`."""
        deadline = monotonic() + timeout_s
        while not self._outcome.done():
            if self._next_line() is not None:  # of workers that repeat steps, because one was lost at the end
                deadline = monotonic() + timeout_s
            elif monotonic() > deadline:
                raise DeadlineExceeded(self._role, 0, "evaluate and save", f"it was not done in {timeout_s:g} s")
            else:
                await asyncio.sleep(_POLL_S)
        outcome = self._outcome.result()
        if isinstance(outcome, RlhfError):
            raise outcome
        return outcome

    def _next_line(self) -> Any:
        """The next line of progress.jsonl; None: there is none yet."""
        line = self._progress.next()
        if line is not None and CONTINUES_AFTER in line and self._progress.offset > self._earlier_bytes:
            self._on_start(line[CONTINUES_AFTER])
        return line

    def _run(self, trainer: TorchTrainer) -> None:
        outcome: Any = RoleError(self._role, 0, "train", "Ray Train ended without an answer; see the driver's log")
        try:
            fitted: Any = trainer.fit()
            outcome = pickle.loads(fitted.return_value)
        except (TrainingFailedError, ray.exceptions.RayError) as error:
            outcome = failure(self._role, error)
        finally:
            with contextlib.suppress(RuntimeError):  # the driver's loop is closed: no task waits for it
                self._event_loop.call_soon_threadsafe(self._outcome.set_result, outcome)


def failure(role: str, error: Exception) -> RlhfError:
    """A failed training as an RlhfError."""
    if isinstance(error, WorkerGroupError):
        rank, cause = min(error.worker_failures.items(), key=lambda item: item[0])
        way_out = "the workers were not replaced again: failures.infrastructure restarts were used up"
        return RoleError(role, rank, "train", f"{_headline(cause)} ({way_out})")
    if isinstance(error, ControllerError) and "timed out" in str(error):
        return CapacityError(
            f"the cluster did not free the resources of the {role} workers within placement.wait_s; other jobs hold "
            f"them (`ray status` shows which). Wait for them, or lower {role}.ranks or {role}.cpus_per_rank."
        )
    return RoleError(role, 0, "start", _headline(error))


def _headline(error: BaseException) -> str:
    """The last line of a message, after Ray's trace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _trainer(config: Mapping[str, Any], workers: Workers, folder: Path) -> TorchTrainer:
    _set_defaults(workers.room_s)
    resources = {"CPU": float(workers.threads)} | ({"GPU": workers.gpus} if workers.gpus else {})
    on_gpu = workers.gpus > 0
    # Ray's annotations describe its older Train; these keys belong to the current one.
    failures: dict[str, Any] = {"max_failures": workers.restarts, "controller_failure_limit": 0}
    run: dict[str, Any] = {"worker_runtime_env": {"env_vars": environment(workers.threads, on_gpu=on_gpu)}}
    return TorchTrainer(
        train_worker,
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
    """Sets Ray Train's environment variables in the driver; keeps existing ones."""
    # By default it requests resources for a minute at a time, forever.
    defaults = _QUICK | {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(room_s)}
    if len(alive_nodes()) == 1:
        defaults["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def train_worker(config: Mapping[str, Any]) -> bytes:
    """What one Ray Train worker runs.

    Returns:
        Pickled, because Ray Train's controller reads it and would import torch for a result's class: the task's result,
        or an error that all ranks raised: it would recur, so Ray Train must not retry.

    Raises:
        Exception: an error of this rank alone. Ray Train then stops the other ranks and restarts all.
    """
    return pickle.dumps(_train(config))


def _train(config: Mapping[str, Any]) -> Any:
    training: Training[Any] = ray.get(config["training"])
    group = _group_of_ray_train(training)
    work = WorkFolder(training.work, on_rank_0(lambda: uuid.uuid4().hex[:8], group))
    try:
        on_rank_0(lambda: _begin(work, training.unexpected_errors), group)
        return Trainer(training, ray.get(config["data"]), group, work).run()
    except Exception as error:
        if isinstance(error, RlhfError) and not (isinstance(error, StorageError) and group.world_size > 1):
            return error
        found = worker_error(error, training.role, group.rank, "train")
        if not isinstance(found, RoleLost):
            with contextlib.suppress(StorageError):
                work.failed(found)
        raise


def _begin(work: WorkFolder, unexpected_errors: int) -> None:
    """Claims the work folder. Raises an error of earlier tries that would recur."""
    work.claim()
    failures = work.failures()
    if failures and (len(failures) > unexpected_errors or not isinstance(failures[-1], RoleError)):
        raise failures[-1]


def _group_of_ray_train(training: Training[Any]) -> Group:
    """Makes DeepSpeed use Ray Train's process group."""
    context = ray.train.get_context()
    local_rank = os.environ["LOCAL_RANK"]
    if torch.cuda.is_available():
        torch.cuda.set_device(ray.train.torch.get_device())
    group = Group(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        master_addr=os.environ["MASTER_ADDR"],
        master_port=int(os.environ["MASTER_PORT"]),
        timeout_s=training.timeout_s,
        threads=training.threads,
    )
    distributed.join(group)
    # Ray Train exposes all GPUs of the node to a worker, and DeepSpeed uses the one with this number.
    os.environ["LOCAL_RANK"] = local_rank
    return group
