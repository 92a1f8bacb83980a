"""What every objective is made of: the torch half of an algorithm."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from actors.learning.objectives.losses import LossTerms

Columns = Mapping[str, Tensor]


@dataclass(frozen=True)
class LearnJob:
    """What a step's learning needs beside its experience.

    Args:
        step: of the coordinator; names the step in errors and seeds the minibatches together with `seed`.
        advantage_mean, advantage_std: moments over the whole step, for whitening.
        kl_coefficient: weight of the KL to the reference where it is in the loss.
        seed: of the run.
    """

    step: int
    advantage_mean: float
    advantage_std: float
    kl_coefficient: float
    seed: int


class Objective(ABC):
    """What the policy, and the critic if there is one, minimise. Built from the section `algorithm`.

    Shapes: N learned tokens of a micro-batch laid end to end.

    `policy_columns`, `critic_columns`: columns of schema.EXPERIENCE that the losses read; the critic's are at least
    `values` and `returns`.
    """

    policy_columns: tuple[str, ...] = ()
    critic_columns: tuple[str, ...] = ("values", "returns")

    @abstractmethod
    def policy_terms(self, logprobs_N: Tensor, entropy_N: Tensor, columns: Columns, job: LearnJob) -> LossTerms:
        """The policy's loss of one micro-batch."""

    def critic_terms(self, values_N: Tensor, columns: Columns) -> LossTerms:
        """The critic's loss of one micro-batch, where the algorithm needs a critic."""
        raise NotImplementedError(f"{type(self).__name__} has no critic")
