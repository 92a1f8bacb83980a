"""The critic: values of the states in which response tokens are chosen, and learning them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from actors.learning import distributed
from actors.learning.distributed import Group
from actors.learning.heads import ValueModel
from actors.learning.learner import LearnerSettings
from actors.learning.model import NewHead, load_scorer, resolve_model
from actors.learning.objectives.losses import LossTerms
from actors.learning.objectives.objective import LearnJob
from actors.learning.objectives.table import objective_of
from actors.learning.packing import MicroBatch, TokenRows
from actors.learning.worker import LearningWorker, Share, answers, averaged, token_lists
from orchestrator import schema
from orchestrator.algorithms.algorithm import Algorithm


@dataclass(frozen=True)
class CriticSettings:
    """Args:
    model: folder or name, see resolve_model; `cache_dir` holds converted models.
    new_head: None: the model must have a scalar head; otherwise the head to make when it has none, from `seed`.
    """

    model: str
    cache_dir: Path
    learner: LearnerSettings
    algorithm: Algorithm
    new_head: NewHead | None = None
    seed: int = 0
    micro_batch_tokens: int = 2048
    trust_remote_code: bool = False


class CriticWorker(LearningWorker):
    """One rank of the critic."""

    def __init__(self, settings: CriticSettings, group: Group) -> None:
        distributed.join(group)
        folder = resolve_model(settings.model, settings.cache_dir)
        scorer = load_scorer(
            folder,
            settings.learner.torch_dtype,
            new_head=settings.new_head,
            seed=settings.seed,
            trust_remote_code=settings.trust_remote_code,
        )
        self.settings = settings
        super().__init__(
            ValueModel(scorer),
            settings.learner,
            group,
            micro_batch_tokens=settings.micro_batch_tokens,
        )

    def values(self, table: pa.Table, share: Share | None = None) -> pa.Table:
        """Table of schema.VALUES for a share of a rollout or experience table; see PolicyWorker.logprobs."""
        found = list(
            answers(
                TokenRows(table),
                self.learner.pass_through,
                share or self.share,
                micro_batch_tokens=self.micro_batch_tokens,
                device=self.learner.device,
            )
        )
        positions, lists = token_lists([(micro, values_N) for micro, (values_N, _) in found])
        columns = {
            "row": table["row"].take(pa.array(positions)),
            "values": lists,
            "bootstrap_value": pa.array(_per_row(found), pa.float32()),
        }
        return pa.table(columns, schema=schema.VALUES)

    def learn(self, tables: list[pa.Table], job: LearnJob) -> dict[str, float]:
        """All epochs and minibatches of one step; `explained_variance` is of the values before it.

        Raises:
            NonFiniteError: before anything non-finite is applied.
        """
        algorithm = self.settings.algorithm
        objective = objective_of(algorithm)
        rows = TokenRows(pa.concat_tables(tables), objective.critic_columns, learned_only=True)

        def loss(output: tuple[Tensor, Tensor], micro: MicroBatch) -> LossTerms:
            return objective.critic_terms(output[0], micro.columns)

        updates = self.run_epochs(rows, loss, job, epochs=algorithm.epochs, num_minibatches=algorithm.minibatches)
        returns_N = rows.token_column("returns").astype(np.float64)
        residuals_N = returns_N - rows.token_column("values")
        variance = float(returns_N.var())
        explained = 1.0 - float(residuals_N.var()) / variance if variance > 0.0 else 0.0
        return {**averaged(updates), "explained_variance": explained}


def _per_row(found: list[tuple[MicroBatch, tuple[Tensor, Tensor]]]) -> list[float]:
    last = {
        row: value
        for micro, (_, last_B) in found
        for row, value in zip(micro.rows, last_B.to("cpu", torch.float32).tolist(), strict=True)
    }
    return [last[row] for row in sorted(last)]
