"""The task of training without rollouts: a dataset, an objective, and a final step with the trained model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

from actors.learning.distributed import Group
from actors.learning.learner import Learner, Loss, Update
from actors.learning.packing import TokenRows

Made_co = TypeVar("Made_co", covariant=True)


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
