"""Runs training without rollouts for a stage: starts or continues it, and reports its steps."""

from __future__ import annotations

import hashlib
import math
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray

from actors.groups.cluster import alive_nodes
from actors.learning.distributed import Group
from actors.training.task import Task, TaskInputs
from actors.training.train_run import Progress, TrainRun, Workers
from actors.training.trainer import Training
from actors.training.work import open_work
from jobs.stages.settings import chat_template
from orchestrator.config.config import Config
from orchestrator.config.sections import DeadlinesConfig
from orchestrator.config.trainings import OfflineConfig
from orchestrator.planning.demands import plan_training
from orchestrator.run.storage import writing
from orchestrator.watching.telemetry import Telemetry

_WORDS = {"loss": "loss {:.3f}", "accuracy": "pairs in order {:.0%}", "absolute_error": "absolute error {:.2f}"}
SHOWN = 20  # console lines about the optimizer steps of a stage

Say = Callable[[str], None]
Inputs = TypeVar("Inputs", bound=TaskInputs)


@dataclass(frozen=True)
class Report:
    """Reports the steps of a training.

    Args:
        num_steps: optimizer steps of the whole training.
        recorded: metrics to record, as ROLE/NAME.
        describe: text about recent steps, for the console.
    """

    telemetry: Telemetry
    say: Say
    role: str
    num_steps: int
    recorded: Sequence[str]
    describe: Callable[[Sequence[Progress]], str]

    def started(self, step: int, *, known: int) -> None:
        """Workers start to learn after `step` optimizer steps, while the driver has the metrics of `known` steps."""
        if step or known:
            self.telemetry.event("training_continued", step=step)
            whence = f"continues after step {step} of {self.num_steps}" if step else "starts again at its first step"
            self.say(f"{self._title}: {whence}")

    def show(self, steps: Sequence[Progress]) -> None:
        """Prints a line for each twentieth of the training."""
        every = max(self.num_steps // SHOWN, 1)
        if len(steps) % every and len(steps) != self.num_steps:
            return
        recent = steps[-every:]
        seconds = statistics.fmean(step["seconds"] for step in recent)
        speed = statistics.fmean(step["tokens"] for step in recent) / seconds
        self.say(
            f"{self._title} {len(steps)}/{self.num_steps}  {self.describe(recent)}  {speed:.0f} tok/s  "
            f"{(self.num_steps - len(steps)) * seconds:.0f} s left"
        )

    @property
    def _title(self) -> str:
        return self.role.replace("_", " ")


def inputs_of(kind: type[Inputs], config: Config, section: OfflineConfig, folder: Path, *, num_records: int) -> Inputs:
    """The inputs of a training whose finished model is `folder`; its work folder is next to that."""
    folder = folder.absolute()
    return kind(
        stage=section,
        policy=config.model,
        template=chat_template(config),
        cache=config.run.cache,
        folder=folder,
        work=folder.with_name(f".{folder.name}.work"),
        total_optimizer_steps=section.num_steps(num_records),
        seed=config.run.seed,
    )


def of_last_tenth(steps: Sequence[Progress], name: str) -> float:
    """The mean of a metric over the last tenth of the optimizer steps."""
    return statistics.fmean(step[name] for step in steps[-math.ceil(len(steps) / 10) :])


def words(steps: Sequence[Progress]) -> str:
    """Text about steps, for the console."""
    return "  ".join(
        text.format(statistics.fmean(step[name] for step in steps)) for name, text in _WORDS.items() if name in steps[0]
    )


async def train_section(
    config: Config,
    section: OfflineConfig,
    make: Callable[[Any, Group], Task[Any]],
    data: Any,
    work: Path,
    report: Report,
    *,
    identity: object,
) -> tuple[Sequence[Progress], Any]:
    """Trains what a section of the config says, on workers of the connected cluster; see `train`."""
    role, limits = report.role, config.deadlines
    threads = plan_training(role, section, alive_nodes()).slots[0].threads
    training = Training(
        role=role,
        make=make,
        passes=section,
        seed=config.run.seed,
        work=work,
        unexpected_errors=config.failures.programming,
        threads=threads,
        timeout_s=limits.learn_s,
    )
    workers = Workers(
        role=role,
        count=section.ranks,
        threads=threads,
        gpus=section.gpus_per_rank,
        room_s=config.placement.wait_s,
        collective_s=limits.learn_s,
        restarts=config.failures.infrastructure,
    )
    return await train(training, data, workers, limits, report, identity=identity)


async def train(
    training: Training[Any],
    data: Any,
    workers: Workers,
    deadlines: DeadlinesConfig,
    report: Report,
    *,
    identity: object,
) -> tuple[Sequence[Progress], Any]:
    """Trains to the end. Continues what an earlier driver left in the work folder, if it trained the same.

    Args:
        data: handed to `training.make` on every worker.
        identity: everything that decides what is learned; its repr identifies the training.

    Returns:
        The metrics of every optimizer step, and what the task made.

    Raises:
        CapacityError: the cluster does not free the workers' resources in time.
        RlhfError: what ended the training.
    """
    digest = hashlib.sha256(repr((workers.count, identity)).encode()).hexdigest()
    if not open_work(training.work, digest):
        report.telemetry.rewind(0)
    with writing(training.work):
        shutil.rmtree(training.work / "ray-train", ignore_errors=True)
    # Workers may have to start within the deadline: at the beginning, and after one of them was lost.
    timeout_s = deadlines.start_s + deadlines.learn_s
    steps: list[Progress] = []
    run = TrainRun(
        # References, because Ray Train's controller reads this dictionary, and would import torch to read a Training.
        {"training": ray.put(training), "data": ray.put(data)},
        workers,
        training.work,
        on_start=lambda step: report.started(step, known=len(steps)),
    )
    await _follow(run, steps, timeout_s, report)
    return steps, await run.result(timeout_s)


async def _follow(run: TrainRun, steps: list[Progress], timeout_s: float, report: Report) -> None:
    """Adds the metrics of all steps, and reports those that no earlier driver has reported."""
    num_reported = report.telemetry.num_steps_written()
    while len(steps) < report.num_steps:
        if len(steps) < num_reported:
            steps.append(await run.next_step(timeout_s))
            continue
        with report.telemetry.step(len(steps)) as record:
            progress = await run.next_step(timeout_s)
            record({f"{report.role}/{name}": progress[name] for name in report.recorded})
        steps.append(progress)
        report.show(steps)
