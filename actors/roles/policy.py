"""The policy: computes log-probs of samples and learns with the algorithm's objective."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor

from actors.learning import distributed
from actors.learning.average import WeightAverage
from actors.learning.distributed import Group
from actors.learning.heads import PolicyModel, ValueModel
from actors.learning.learner import Update
from actors.learning.objectives.losses import LossTerms
from actors.learning.objectives.objective import LearnJob, Rows
from actors.learning.objectives.table import objective_of
from actors.learning.packing import MicroBatch, TokenRows
from actors.learning.worker import Forward, LearningWorker, MixedIn, RankContext, Share, answers, averaged, token_lists
from actors.models.model import load_causal, resolve_model, scorer_on_trunk, torch_dtype
from actors.roles.critic import Critic
from actors.text.conversations import load_chat
from orchestrator import schema
from orchestrator.config.sections import CriticConfig, PolicyConfig

_FIRST_RATIOS = ("ratio_mean", "ratio_deviation_max")


class PolicyWorker(LearningWorker):
    """One rank of the policy.

    Args:
        critic: section of a critic that shares the policy's trunk, with adapters and a head of its own; null: none.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        context: RankContext,
        group: Group,
        mixed_in: MixedIn | None = None,
        critic: CriticConfig | None = None,
    ) -> None:
        self._mixed_in, self._max_new_tokens = mixed_in, context.max_new_tokens
        distributed.join(group)
        trust, dtype = context.model.trust_remote_code, torch_dtype(context.model.compute_dtype)
        folder = resolve_model(context.model.path, context.cache)
        language_model = load_causal(folder, dtype, trust_remote_code=trust)
        self._chat = load_chat(folder, context.model, context.template)
        super().__init__(
            PolicyModel(language_model, temperature=context.temperature),
            policy,
            context,
            group,
            tokenizer=self._chat.tokenizer,
            compares=context.algorithm.compares_samples,
        )

        decay = policy.ema_decay
        self._average = WeightAverage(decay, holds=group.rank == 0) if decay else None
        self._critic: Critic | None = None
        if critic is not None:
            scorer = scorer_on_trunk(language_model, folder, trust_remote_code=trust)
            self._critic = Critic(ValueModel(scorer), critic, context, group, name="critic")

    @property
    def critic(self) -> Critic:
        """The critic on this trunk."""
        assert self._critic is not None, "the critic has a process of its own"
        return self._critic

    def critic_values(self, table: pa.Table, share: Share | None = None) -> pa.Table:
        return self.critic.values(table, share)

    def critic_learn(self, tables: list[pa.Table], job: LearnJob) -> dict[str, float]:
        return self.critic.learn(tables, job)

    def critic_save(self, folder: Path) -> None:
        self.critic.save(folder)

    def critic_load(self, folder: Path) -> None:
        self.critic.load(folder)

    def rest(self, *, keeps_weights: bool = False) -> None:
        """With the critic on its trunk."""
        super().rest(keeps_weights=keeps_weights)
        if self._critic is not None:
            self._critic.rest(keeps_weights=keeps_weights)

    def resume(self) -> None:
        super().resume()
        if self._critic is not None:
            self._critic.resume()

    def save(self, folder: Path) -> None:
        super().save(folder)
        if self._average is not None:
            self._average.save(folder)

    def load(self, folder: Path) -> None:
        super().load(folder)
        if self._average is not None:
            self._average.load(folder)

    def export(self, folder: Path) -> None:
        """The average, if there is one. Either was first exported as it learns, and proved so."""
        super().export(folder)
        if self._average is not None and self._average.has_begun:
            self.learner.export_weights(self._average.state, folder, self.tokenizer)
        if self.group.rank == 0:
            self._chat.save_stops(folder)

    def logprobs(self, table: pa.Table, share: Share | None = None) -> pa.Table:
        """Table of schema.LOGPROBS for a share of a rollout or experience table. None: this rank's share in its group;
        with ZeRO-3 all ranks must compute together."""
        return self._logprobs(table, share, self.learner.pass_through)

    def reference_logprobs(self, table: pa.Table, share: Share | None = None) -> pa.Table:
        """The same of the policy before learning, which a policy with adapters still holds: its trunk."""
        return self._logprobs(table, share, self.learner.pass_through_trunk)

    def _logprobs(self, table: pa.Table, share: Share | None, forward: Forward) -> pa.Table:
        return logprobs_table(
            table,
            [
                (micro, output[0])
                for micro, output in answers(
                    TokenRows.of_table(table),
                    forward,
                    share or self.share,
                    micro_batch_tokens=self.micro_batch_tokens,
                    device=self.learner.device,
                    shares_prompts=self.shares_prompts,
                )
            ],
        )

    def learn(self, tables: list[pa.Table], job: LearnJob) -> dict[str, float]:
        """All epochs and minibatches of one step on the experience tables of all its shards.

        Returns:
            Metrics, equal on all ranks. `first_ratio_*` are from the first minibatch, before the first update: on
            policy they are 1 up to the rounding error of the compute type.

        Raises:
            NonFiniteError: before a non-finite update is applied.
        """
        algorithm = self.algorithm
        objective = objective_of(algorithm)
        rows = TokenRows.of_table(pa.concat_tables(tables), objective.policy_columns, learned_only=True)

        if self._average is not None and not self._average.has_begun:
            self._average.add(self.full_weights(torch.float32, is_kept=self._average.holds))

        def loss(output: tuple[Tensor, Tensor], micro: MicroBatch, mean_length: float) -> LossTerms:
            read = Rows(micro.columns, micro.lengths_B, mean_length, self._max_new_tokens)
            return objective.policy_terms(*output, read, job)

        def diverged(update: Update) -> bool:
            return algorithm.early_stop_kl is not None and update.means["approx_kl"] > algorithm.early_stop_kl

        updates = self.run_epochs(
            rows,
            loss,
            job,
            epochs=algorithm.epochs,
            num_minibatches=algorithm.minibatches,
            enough=diverged,
            mixed_in=self._mixed_in,
        )
        if self._average is not None:
            self._average.add(self.full_weights(torch.float32, is_kept=self._average.holds))
        first = updates[0][2]
        ratios = {name: value for name, value in {**first.means, **first.maxima}.items() if name in _FIRST_RATIOS}
        return {**averaged(updates), **{f"first_{name}": value for name, value in ratios.items()}}


def logprobs_table(table: pa.Table, parts: list[tuple[MicroBatch, Tensor]]) -> pa.Table:
    positions, lists = token_lists(parts)
    return pa.table({"row": table["row"].take(pa.array(positions)), "logprobs": lists}, schema=schema.LOGPROBS)
