"""The task of training without rollouts: a dataset, an objective, and a final step with the trained model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from actors.learning.distributed import Group
from actors.learning.learner import Learner, Loss, Update
from actors.learning.packing import TokenRows
from orchestrator.config.sections import ModelConfig
from orchestrator.config.trainings import OfflineConfig

Made_co = TypeVar("Made_co", covariant=True)


@dataclass(frozen=True)
class TaskInputs:
    """What a task needs besides its data.

    Args:
        stage: config section.
        policy, template: the policy, and the text of its chat template; the initial model, if the stage has no other.
        cache: folder of converted models.
        folder: the finished model; replaced completely.
        work: folder for the unfinished model, on the file system of `folder`.
        total_optimizer_steps: optimizer steps of all epochs.
        seed: of the run.
    """

    stage: OfflineConfig
    policy: ModelConfig
    template: str | None
    cache: Path
    folder: Path
    work: Path
    total_optimizer_steps: int
    seed: int

    @property
    def identity(self) -> tuple[object, ...]:
        """Everything besides the data that decides what is learned."""
        model = self.policy
        policy = (model.path, model.compute_dtype, model.system_prompt, model.today, self.template)
        stage = self.stage.model_dump(exclude={"checkpoint_every_steps"})
        return policy, stage, self.total_optimizer_steps, self.seed


class Dataset(Protocol):
    """Records of one or more rows of tokens. A batch is a list of record indices."""

    @property
    def num_records(self) -> int: ...

    @property
    def rows(self) -> TokenRows: ...

    def micro_batches(self, records: Sequence[int], group: Group, micro_batch_tokens: int) -> list[tuple[int, ...]]:
        """Rows of this rank's micro-batches of one batch. All ranks get the same number of micro-batches."""
        ...

    def num_tokens(self, records: Sequence[int]) -> int:
        """Number of tokens of one batch, over all ranks."""
        ...


class Task(Protocol[Made_co]):
    """One rank's part of a training. The constructor loads the model and tokenises the data."""

    @property
    def learner(self) -> Learner: ...

    @property
    def data(self) -> Dataset: ...

    def objective(self, records: Sequence[int]) -> Loss:
        """Collective. The loss of one batch: sums over each of its micro-batches, and what is reported."""
        ...

    def count(self, records: Sequence[int]) -> float:
        """The divisor of a batch's sums over all ranks, such as its number of records or tokens."""
        ...

    def metrics(self, update: Update) -> Mapping[str, float]:
        """The metrics of one optimizer step."""
        ...

    def finish(self) -> Made_co:
        """Collective. Produces the result from the trained model; a second call replaces the first result."""
        ...
