"""Base of policy and critic workers: a learner, forwards over a shard in micro-batches, and the loop over minibatches.

All ranks of a group get the same tables to learn from and make the same number of forwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from actors.learning.distributed import Group
from actors.learning.heads import PolicyModel, ValueModel
from actors.learning.learner import Learner, Loss, Update
from actors.learning.objectives.losses import LossTerms, likelihood_loss
from actors.learning.objectives.objective import LearnJob
from actors.learning.packing import MicroBatch, TokenRows
from actors.learning.sharing import can_share
from orchestrator.algorithms.algorithm import Algorithm
from orchestrator.config.sections import LearnerConfig, ModelConfig
from orchestrator.planning.balance import plan_forwards, plan_minibatches

Forward = Callable[[MicroBatch], Any]
MinibatchLoss = Callable[[Any, MicroBatch, float], LossTerms]
"""(model output, micro-batch, learned tokens per row of its whole minibatch over all ranks) -> sums"""
_MIXED_IN = 0x707478  # part of the seeds by which rows are mixed in


@dataclass(frozen=True)
class Share:
    """The rows i of a table with i % count == index, or its groups i if rows share their prompt."""

    index: int = 0
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class RankContext:
    """Inputs of a rank of policy, critic or reference in addition to its config section.

    Args:
        model: the policy.
        cache: folder of converted models.
        template: text of model.chat_template, exported with the policy; None: the tokenizer's own.
        temperature: sampling temperature, also used for all log-probs.
        seed: of a new head and of adapters.
        total_optimizer_steps: optimizer steps of the whole run.
        max_new_tokens: longest response, in tokens.
    """

    model: ModelConfig
    algorithm: Algorithm
    cache: Path
    template: str | None
    temperature: float
    seed: int
    total_optimizer_steps: int
    max_new_tokens: int


class MixedIn:
    """Rows whose likelihood the policy learns in the same optimizer steps as its experience (PPO-ptx, Ouyang 2022,
    eq. 2): `coefficient` times their mean negative log-likelihood per token is added to the loss.

    Which rows a step gets follows from the seed and the number of the step alone, so that a replay gets the same.

    Args:
        table: rows of tokens with the column `learn`, see actors.text.learned.
        num_rows: of one optimizer step.
    """

    def __init__(self, table: pa.Table, *, coefficient: float, num_rows: int) -> None:
        self._rows = TokenRows.of_table(table, learned_only=True)
        self._coefficient, self._num_rows = coefficient, min(num_rows, table.num_rows)

    def step(
        self,
        main: Loss,
        seed: Sequence[int],
        group: Group,
        *,
        count: float,
        micro_batch_tokens: int,
        device: torch.device,
    ) -> tuple[list[MicroBatch], Loss]:
        """This rank's additional micro-batches of one optimizer step, and the loss of these and all others.

        Args:
            main: the loss of the other micro-batches.
            count: what the sums of the step are divided by.
        """
        generator = np.random.default_rng((*seed, _MIXED_IN))
        chosen = generator.choice(self._rows.num_rows, self._num_rows, replace=False).tolist()
        (ranks,) = plan_minibatches(
            self._rows.row_lengths[chosen].tolist(),
            num_minibatches=1,
            num_ranks=group.world_size,
            micro_batch_tokens=micro_batch_tokens,
            seed=0,
        )
        micros = [self._rows.pack([chosen[number] for number in micro], device) for micro in ranks[group.rank]]
        mine = {id(micro) for micro in micros}
        scale = count / float(self._rows.learned_lengths[chosen].sum())

        def loss(output: tuple[Tensor, Tensor], micro: MicroBatch) -> LossTerms:
            if id(micro) not in mine:
                return main(output, micro)
            likelihood = likelihood_loss(output[0]).loss * scale
            return LossTerms(self._coefficient * likelihood, {"ptx_loss": likelihood.detach()})

        return micros, loss


class LearningWorker:
    """One rank of a learning group. Its methods are collective, see Learner.

    Args:
        tokenizer: exported with the model; None: the model is never exported.
        name: of the adapters, where critic and policy share a trunk.
        compares: the algorithm compares the samples of a prompt: they stay in one minibatch, and their prompt is
            computed once if the model supports it.
    """

    def __init__(
        self,
        model: PolicyModel | ValueModel,
        learner: LearnerConfig,
        context: RankContext,
        group: Group,
        *,
        tokenizer: Any = None,
        name: str = "default",
        compares: bool = False,
    ) -> None:
        self.group = group
        self.algorithm = context.algorithm
        self.share = Share(group.rank, group.world_size)
        self.compares = compares
        self.shares_prompts = compares and can_share(model.pretrained)
        self.learner = Learner(
            model,
            learner,
            dtype=context.model.compute_dtype,
            total_optimizer_steps=context.total_optimizer_steps,
            seed=context.seed,
            name=name,
        )
        self.tokenizer = tokenizer
        self.micro_batch_tokens = learner.micro_batch_tokens

    def save(self, folder: Path) -> None:
        self.learner.save(folder)

    def load(self, folder: Path) -> None:
        self.learner.load(folder)

    def export(self, folder: Path) -> None:
        self.learner.export(folder, self.tokenizer)

    def rest(self, *, keeps_weights: bool = False) -> None:
        """Gives back the device's memory while others compute; see Learner.rest."""
        self.learner.rest(keeps_weights=keeps_weights)

    def resume(self) -> None:
        self.learner.resume()

    def full_weights(self, dtype: torch.dtype | None = None, *, is_kept: bool = True) -> Iterator[tuple[str, Tensor]]:
        return self.learner.full_weights(dtype, is_kept=is_kept)

    def run_epochs(
        self,
        rows: TokenRows,
        objective: MinibatchLoss,
        job: LearnJob,
        *,
        epochs: int,
        num_minibatches: int,
        enough: Callable[[Update], bool] = lambda update: False,
        mixed_in: MixedIn | None = None,
    ) -> list[tuple[float, int, Update]]:
        """Runs the optimizer steps of one step. Stops after the first update for which `enough` is true.

        Returns:
            (learned tokens, epoch, update) of each optimizer step.
        """
        lines = rows.bundles(longest=self.micro_batch_tokens, shared=self.shares_prompts)
        updates: list[tuple[float, int, Update]] = []
        for epoch in range(epochs):
            plan = plan_minibatches(
                [rows.line_length(line) for line in lines],
                num_minibatches=num_minibatches,
                num_ranks=self.group.world_size,
                micro_batch_tokens=self.micro_batch_tokens,
                seed=(job.seed, job.step, epoch),
                groups=[rows.prompt_of[line[0]] for line in lines] if self.compares else None,
            )
            for number, ranks in enumerate(plan):
                minibatch = [row for micros in ranks for micro in micros for line in micro for row in lines[line]]
                count = float(rows.learned_lengths[minibatch].sum())
                device, loss = self.learner.device, _of_minibatch(objective, count / len(minibatch))
                micros = [rows.pack_lines([lines[i] for i in micro], device) for micro in ranks[self.group.rank]]
                if mixed_in is not None:
                    more, loss = mixed_in.step(
                        loss,
                        (job.seed, job.step, epoch, number),
                        self.group,
                        count=count,
                        micro_batch_tokens=self.micro_batch_tokens,
                        device=device,
                    )
                    micros += more
                update = self.learner.update(
                    micros,
                    loss,
                    count=count,
                    what=f"step {job.step}, epoch {epoch}, minibatch {number}",
                )
                updates.append((count, epoch, update))
                if enough(update):
                    return updates
        return updates


def _of_minibatch(objective: MinibatchLoss, mean_length: float) -> Loss:
    return lambda output, micro: objective(output, micro, mean_length)


def answers(
    rows: TokenRows,
    forward: Forward,
    share: Share,
    *,
    micro_batch_tokens: int,
    device: torch.device,
    shares_prompts: bool = False,
    part: range | None = None,
) -> Iterator[tuple[MicroBatch, Any]]:
    """Yields (micro-batch, output) for this share of the rows. Dummies are run but not yielded.

    Args:
        shares_prompts: adjacent rows with the same prompt stay together, and their prompt is computed once.
        part: only these rows. None: all.
    """
    lines = rows.bundles(longest=micro_batch_tokens, shared=shares_prompts, part=part)
    lengths = [rows.line_length(line) for line in lines]
    plan = plan_forwards(
        lengths,
        num_ranks=share.count,
        micro_batch_tokens=micro_batch_tokens,
        is_packed=rows.is_packed and not shares_prompts,
    )
    for numbers in plan[share.index]:
        micro = rows.pack_lines([lines[number] for number in numbers], device)
        output = forward(micro)
        if micro.rows:
            yield micro, output


def token_lists(parts: Sequence[tuple[MicroBatch, Tensor]]) -> tuple[npt.NDArray[np.int64], pa.ListArray]:
    """(table positions of the rows in ascending order, their per-token values as lists)"""
    pieces = {
        row: piece
        for micro, values_N in parts
        for row, piece in zip(micro.rows, torch.split(values_N.float().cpu(), micro.lengths_B.tolist()), strict=True)
    }
    positions = np.array(sorted(pieces), dtype=np.int64)
    arrays = [pieces[int(row)].numpy() for row in positions]
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])]).astype(np.int32)
    flat = np.concatenate(arrays) if arrays else np.zeros(0, np.float32)
    return positions, pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, pa.float32()))


def averaged(updates: Sequence[tuple[float, int, Update]]) -> dict[str, float]:
    """Metrics of a step: token-weighted means, maxima, mean and largest gradient norm, last learning rate."""
    total = sum(count for count, _, _ in updates)
    names = updates[0][2].means
    metrics = {name: sum(count * update.means[name] for count, _, update in updates) / total for name in names}
    for name in updates[0][2].maxima:
        metrics[name] = max(update.maxima[name] for _, _, update in updates)
    norms = [update.grad_norm for _, _, update in updates]
    return {
        **metrics,
        "grad_norm": sum(norms) / len(norms),
        "grad_norm_max": max(norms),
        "learning_rate": updates[-1][2].learning_rate,
        "optimizer_steps": float(len(updates)),
        "epochs": float(updates[-1][1] + 1),
    }
