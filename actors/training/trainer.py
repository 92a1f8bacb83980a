"""The training loop without rollouts on one rank: from the last checkpoint to the finished result."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from actors.learning.distributed import Group, on_rank_0
from actors.training.checkpoints import TrainingCheckpoints
from actors.training.task import Task
from actors.training.work import WorkFolder
from orchestrator.training.ranking import epoch_batches

Made = TypeVar("Made")


class Passes(Protocol):
    """The keys of a stage's config section about passes over its data."""

    @property
    def epochs(self) -> int: ...

    @property
    def records_per_batch(self) -> int: ...

    @property
    def micro_batch_tokens(self) -> int: ...

    @property
    def checkpoint_every_steps(self) -> int: ...


@dataclass(frozen=True)
class Training(Generic[Made]):
    """Inputs of every worker in addition to the data.

    Args:
        role: names the workers in errors.
        make: (data, the rank's group) -> task of one rank. Can be pickled.
        passes: config section of the stage.
        seed: determines the order of the data.
        work: folder for progress and checkpoints, see work.py; on storage that driver and workers share.
        unexpected_errors: number of unexpected errors after which training is retried.
        threads, timeout_s: CPU threads of one worker, and the deadline of each collective.
    """

    role: str
    make: Callable[[Any, Group], Task[Made]]
    passes: Passes
    seed: int
    work: Path
    unexpected_errors: int
    threads: int
    timeout_s: float


def training_batches(num_records: int, passes: Passes, seed: int) -> Iterator[tuple[int, int, Sequence[int]]]:
    """(epoch, number within the epoch, records) of every batch of a training, from the first on."""
    for epoch in range(passes.epochs):
        batches = epoch_batches(num_records, records_per_batch=passes.records_per_batch, seed=seed, epoch=epoch)
        yield from ((epoch, number, records) for number, records in enumerate(batches))


class Trainer(Generic[Made]):
    """One rank of a training. All ranks construct and run it together.

    Raises:
        DataError: on all ranks, if one of them can't make its task.
    """

    def __init__(self, training: Training[Made], data: Any, group: Group, work: WorkFolder) -> None:
        self._training, self._group, self._work = training, group, work
        self._task = training.make(data, group)
        self._checkpoints = TrainingCheckpoints(work, self._task.learner, group)

    def run(self) -> Made:
        """Continues from the last checkpoint to the end.

        Every step gives the same numbers as in an undisturbed run: the batches derive from the seed and the
        epoch, and the learner's checkpoint is exact.

        Raises:
            NonFiniteError: on all ranks, before a non-finite update is applied.
            StorageError: on this rank at least.
        """
        done = self._checkpoints.restore()
        if self._group.rank == 0:
            self._work.started(done)
        training = self._training
        batches = training_batches(self._task.data.num_records, training.passes, training.seed)
        for step, (epoch, number, records) in enumerate(batches):
            if step < done:
                continue
            metrics = self._step(records, what=f"epoch {epoch}, batch {number}")
            if self._group.rank == 0:
                self._work.stepped(step, metrics)
            if self._is_due(step + 1):
                self._checkpoints.save(step + 1)
        on_rank_0(self._work.require_newest, self._group)
        return self._task.finish()

    def _step(self, records: Sequence[int], *, what: str) -> Mapping[str, float]:
        """One optimizer step; its metrics."""
        task, data = self._task, self._task.data
        started = time.monotonic()
        micros = data.micro_batches(records, self._group, self._training.passes.micro_batch_tokens)
        update = task.learner.update(
            [data.rows.pack(rows, task.learner.device) for rows in micros],
            task.objective(records),
            count=task.count(records),
            what=f"{self._training.role}, {what}",
        )
        seconds = time.monotonic() - started
        return {**task.metrics(update), "tokens": data.num_tokens(records), "seconds": seconds}

    def _is_due(self, step: int) -> bool:
        every = self._training.passes.checkpoint_every_steps
        return bool(every) and step % every == 0
