"""The policy: log-probs of what was sampled, and PPO's clipped objective."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from torch import Tensor

from actors.learning import distributed
from actors.learning.distributed import Group
from actors.learning.heads import PolicyModel
from actors.learning.learner import LearnerSettings, Update
from actors.learning.model import load_causal, resolve_model
from actors.learning.objectives.losses import LossTerms, importance_weights, kl_loss, policy_loss
from actors.learning.packing import MicroBatch, TokenRows
from actors.learning.worker import LearningWorker, LearnJob, Share, answers, averaged, token_lists
from actors.text.conversations import load_chat
from actors.text.templates import OWN_CHAT, ChatSettings
from orchestrator import schema
from orchestrator.algorithms.algorithm import Algorithm
from orchestrator.algorithms.ppo import Ppo

_COLUMNS = ("old_logprobs", "ref_logprobs", "engine_logprobs", "advantages")


@dataclass(frozen=True)
class PolicySettings:
    """Args:
    model: folder or name, see resolve_model; `cache_dir` holds converted models.
    temperature: at which responses were sampled; all log-probs are at it.
    chat: what the run sets about conversations; its template and stop tokens go with the exported model.
    """

    model: str
    cache_dir: Path
    learner: LearnerSettings
    algorithm: Algorithm
    temperature: float = 1.0
    micro_batch_tokens: int = 2048
    chat: ChatSettings = OWN_CHAT
    trust_remote_code: bool = False


class PolicyWorker(LearningWorker):
    """One rank of the policy."""

    def __init__(self, settings: PolicySettings, group: Group) -> None:
        distributed.join(group)
        folder = resolve_model(settings.model, settings.cache_dir)
        language_model = load_causal(folder, settings.learner.torch_dtype, trust_remote_code=settings.trust_remote_code)
        model = PolicyModel(language_model, temperature=settings.temperature)
        self.settings = settings
        self._chat = load_chat(folder, settings.chat, trust_remote_code=settings.trust_remote_code)
        super().__init__(
            model,
            settings.learner,
            group,
            tokenizer=self._chat.tokenizer,
            micro_batch_tokens=settings.micro_batch_tokens,
            compares=settings.algorithm.compares_samples,
        )

    def export(self, folder: Path) -> None:
        super().export(folder)
        if self.group.rank == 0:
            self._chat.save_stops(folder)

    def logprobs(self, table: pa.Table, share: Share | None = None) -> pa.Table:
        """Table of schema.LOGPROBS for a share of a rollout or experience table. Null: this rank's of its group, which
        is what ZeRO-3 needs of all ranks together."""
        return logprobs_table(
            table,
            [
                (micro, output[0])
                for micro, output in answers(
                    TokenRows(table),
                    self.learner.pass_through,
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
            Metrics, equal on all ranks. `first_ratio_*` are of the first minibatch, before anything was learned: on
            policy they are 1 within the compute type's error.

        Raises:
            NonFiniteError: before anything non-finite is applied.
        """
        algorithm = self.settings.algorithm
        rows = TokenRows(pa.concat_tables(tables), _COLUMNS)

        def objective(output: tuple[Tensor, Tensor], micro: MicroBatch) -> LossTerms:
            return ppo_terms(*output, micro, algorithm, job)

        def diverged(update: Update) -> bool:
            return algorithm.early_stop_kl is not None and update.means["approx_kl"] > algorithm.early_stop_kl

        updates = self.run_epochs(
            rows, objective, job, epochs=algorithm.epochs, num_minibatches=algorithm.minibatches, enough=diverged
        )
        first = updates[0][2]
        return {
            **averaged(updates),
            "first_ratio_mean": first.means["ratio_mean"],
            "first_ratio_deviation_max": first.maxima["ratio_deviation_max"],
        }


def ppo_terms(
    logprobs_N: Tensor, entropy_N: Tensor, micro: MicroBatch, algorithm: Algorithm, job: LearnJob
) -> LossTerms:
    """Loss of one micro-batch: clipped surrogate, entropy bonus, and KL to the reference where it is in the loss."""
    columns = micro.columns
    advantages_N = columns["advantages"]
    if isinstance(algorithm, Ppo) and algorithm.whiten_advantages:
        advantages_N = (advantages_N - job.advantage_mean) / (job.advantage_std + 1e-8)
    weights_N = None
    sums: dict[str, Tensor] = {"entropy": entropy_N.detach().sum()}
    if algorithm.importance_cap is not None:
        weights_N = importance_weights(columns["old_logprobs"], columns["engine_logprobs"], algorithm.importance_cap)
        sums["importance_weight_mean"] = weights_N.sum()
        sums["importance_capped_fraction"] = (weights_N >= algorithm.importance_cap).sum()
    clipped = policy_loss(
        logprobs_N,
        columns["old_logprobs"],
        advantages_N,
        clip_ratio=algorithm.clip_ratio,
        importance_weights_N=weights_N,
    )
    loss = clipped.loss
    if algorithm.entropy_coefficient:
        loss = loss - algorithm.entropy_coefficient * entropy_N.sum()
    if algorithm.kl_estimator == "k3-loss":
        reference_kl = kl_loss(logprobs_N, columns["ref_logprobs"])
        loss = loss + job.kl_coefficient * reference_kl
        sums["reference_kl_k3"] = reference_kl.detach()
    return LossTerms(loss, {**clipped.sums, **sums, "loss": loss.detach()}, clipped.maxima)


def logprobs_table(table: pa.Table, parts: list[tuple[MicroBatch, Tensor]]) -> pa.Table:
    positions, lists = token_lists(parts)
    return pa.table({"row": table["row"].take(pa.array(positions)), "logprobs": lists}, schema=schema.LOGPROBS)
