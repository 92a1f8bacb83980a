"""Base class of objectives, the torch half of an algorithm."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from actors.learning.objectives.losses import LossTerms

Columns = Mapping[str, Tensor]


@dataclass(frozen=True)
class LearnJob:
    """Inputs of a step's learning in addition to its experience.

    Args:
        step: step of the coordinator; names the step in errors and, with `seed`, seeds the minibatches.
        advantage_mean, advantage_std: moments over the whole step, for whitening.
        kl_coefficient: weight of the KL to the reference if it is part of the loss.
        seed: seed of the run.
    """

    step: int
    advantage_mean: float
    advantage_std: float
    kl_coefficient: float
    seed: int


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one micro-batch.

    Args:
        columns: per-token columns of schema.EXPERIENCE.
        lengths_B: number of learned tokens of each row.
        mean_length: learned tokens per row of the whole minibatch, over all ranks.
        max_new_tokens: longest response, in tokens.
    """

    columns: Columns
    lengths_B: Tensor
    mean_length: float
    max_new_tokens: int


class Objective(ABC):
    """The losses of the policy and of the critic, if there is one. Built from the section `algorithm`.

    Shapes: N learned tokens of a micro-batch, concatenated; B rows.

    `policy_columns`, `critic_columns`: columns of schema.EXPERIENCE that the losses read; the critic's always include
    `values` and `returns`.
    """

    policy_columns: tuple[str, ...] = ()
    critic_columns: tuple[str, ...] = ("values", "returns")

    @abstractmethod
    def policy_terms(self, logprobs_N: Tensor, entropy_N: Tensor, rows: Rows, job: LearnJob) -> LossTerms:
        """The policy's loss of one micro-batch: a sum, to be divided by the learned tokens of the whole minibatch."""

    def critic_terms(self, values_N: Tensor, columns: Columns) -> LossTerms:
        """The critic's loss of one micro-batch, if the algorithm needs a critic."""
        raise NotImplementedError(f"{type(self).__name__} has no critic")
