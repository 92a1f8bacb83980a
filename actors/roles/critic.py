"""The critic: predicts and learns the values of the states in which response tokens are chosen."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from actors.learning import distributed
from actors.learning.distributed import Group
from actors.learning.heads import ValueModel
from actors.learning.objectives.losses import LossTerms
from actors.learning.objectives.objective import LearnJob
from actors.learning.objectives.table import objective_of
from actors.learning.packing import MicroBatch, TokenRows
from actors.learning.worker import LearningWorker, RankContext, Share, answers, averaged, token_lists
from actors.models.model import load_scorer, resolve_model, torch_dtype
from orchestrator import schema
from orchestrator.config.sections import CriticConfig


class Critic(LearningWorker):
    """One rank of a critic, whatever its model."""

    def values(self, table: pa.Table, share: Share | None = None) -> pa.Table:
        """Table of schema.VALUES for a share of a rollout or experience table; see PolicyWorker.logprobs."""
        found = list(
            answers(
                TokenRows.of_table(table),
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
        """All epochs and minibatches of one step. `explained_variance` refers to the values before the step.

        Raises:
            NonFiniteError: before a non-finite update is applied.
        """
        algorithm = self.algorithm
        objective = objective_of(algorithm)
        rows = TokenRows.of_table(pa.concat_tables(tables), objective.critic_columns, learned_only=True)

        def loss(output: tuple[Tensor, Tensor], micro: MicroBatch, _mean_length: float) -> LossTerms:
            return objective.critic_terms(output[0], micro.columns)

        updates = self.run_epochs(rows, loss, job, epochs=algorithm.epochs, num_minibatches=algorithm.minibatches)
        returns_N = rows.token_column("returns").astype(np.float64)
        residuals_N = returns_N - rows.token_column("values")
        variance = float(returns_N.var())
        explained = 1.0 - float(residuals_N.var()) / variance if variance > 0.0 else 0.0
        return {**averaged(updates), "explained_variance": explained}


class CriticWorker(Critic):
    """A critic in a process of its own. Without critic.path it is the policy with a new head. From a reward model with
    several heads it takes their mean."""

    def __init__(self, critic: CriticConfig, context: RankContext, group: Group) -> None:
        distributed.join(group)
        scorer = load_scorer(
            resolve_model(critic.path or context.model.path, context.cache),
            torch_dtype(context.model.compute_dtype),
            new_head=None if critic.path else "zero",
            seed=context.seed,
            heads=1,
            trust_remote_code=context.model.trust_remote_code,
        )
        super().__init__(ValueModel(scorer), critic, context, group)


def _per_row(found: list[tuple[MicroBatch, tuple[Tensor, Tensor]]]) -> list[float]:
    last = {
        row: value
        for micro, (_, last_B) in found
        for row, value in zip(micro.rows, last_B.to("cpu", torch.float32).tolist(), strict=True)
    }
    return [last[row] for row in sorted(last)]
