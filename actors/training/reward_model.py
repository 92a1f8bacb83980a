"""Reward-model training: all replies to a prompt in one term of the loss (Ouyang 2022, eq. 1); the learner, packing and
losses are those of PPO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from actors.learning.distributed import Group, all_or_none
from actors.learning.heads import ValueModel
from actors.learning.learner import Learner, Loss, Update
from actors.learning.objectives.losses import LossTerms
from actors.learning.objectives.reward import REWARD_OBJECTIVES, Judgements, over_heads
from actors.learning.packing import MicroBatch, TokenRows
from actors.models.model import load_scorer, resolve_model, torch_dtype
from actors.rewards.model import RewardStats, write_stats
from actors.text.conversations import Chat, base_chat
from actors.training.artifact import make_artifact
from actors.training.ranked_rows import stored_rankings
from actors.training.ranked_tokens import padding_token
from actors.training.row_values import row_vectors
from actors.training.task import TaskInputs
from orchestrator.config.trainings import RewardModelConfig
from orchestrator.run.storage import write_json
from orchestrator.training.calibration import Calibration, calibration
from orchestrator.training.ensemble import mean_scores
from orchestrator.training.ranking import spread

CALIBRATION_FILE = "calibration.json"
CALIBRATION_REPLIES = 256  # the mean of that many scores is known to a sixteenth of their standard deviation

RankedData = tuple[Path, Path]
"""Folders of the rows to train on and of held-out ones (ranked_tokens.py)."""


@dataclass(frozen=True)
class RewardTraining(TaskInputs):
    """The initial model is the section's `base`, else the policy; see base_chat for its conversations. `seed` is also
    that of a new head."""

    stage: RewardModelConfig


@dataclass(frozen=True)
class Trained:
    """What training found.

    Args:
        held_out_scores: per record, of its replies, best reply first.
        held_out_heads: the same, per head.
    """

    held_out_scores: Sequence[Sequence[float]]
    held_out_heads: Sequence[Sequence[Sequence[float]]]
    calibration: Calibration
    stats: RewardStats


class RewardModelTask:
    """One rank of reward-model training; a Task (task.py). Complete when constructed.

    Raises:
        DataError: on all ranks, when one of them can't load the model.
    """

    def __init__(self, settings: RewardTraining, data: RankedData, group: Group) -> None:
        self.settings, self.group = settings, group
        stage, policy = settings.stage, settings.policy
        dtype, trust = policy.compute_dtype, policy.trust_remote_code

        def load() -> tuple[Chat, Any]:
            folder = resolve_model(stage.base or policy.path, settings.cache)
            chat = base_chat(folder, resolve_model(policy.path, settings.cache), policy, settings.template)
            scorer = load_scorer(
                folder,
                torch_dtype(dtype),
                new_head="normal",
                seed=settings.seed,
                heads=stage.heads,
                layers=stage.layers,
                trust_remote_code=trust,
            )
            return chat, scorer

        self.chat, scorer = all_or_none(load, group)
        num_weights = stage.heads if stage.heads > 1 else 0
        self.data, self._held_out = stored_rankings(data[0], num_weights=num_weights), stored_rankings(data[1])
        padding = padding_token(self.chat)
        self.chat.tokenizer.pad_token = self.chat.tokenizer.convert_ids_to_tokens(padding)
        scorer.config.pad_token_id = padding
        steps = settings.total_optimizer_steps
        self.learner = Learner(
            ValueModel(scorer), stage.learner(steps), dtype=dtype, total_optimizer_steps=steps, seed=settings.seed
        )

    def objective(self, records: Sequence[int]) -> Loss:  # noqa: ARG002 (every batch has the same)
        return self._loss

    def count(self, records: Sequence[int]) -> float:
        return float(len(records))

    def metrics(self, update: Update) -> Mapping[str, float]:
        means, shared = update.means, {"grad_norm": update.grad_norm, "learning_rate": update.learning_rate}
        if self.settings.stage.loss.judgement == "scores":
            return {"loss": means["loss"], "absolute_error": means["absolute_error"], **shared}
        return {
            "loss": means["ranking_loss"],
            "accuracy": means["correct_pairs"] / means["pairs"],
            "margin": means["margin_pairs"] / means["pairs"],
            **shared,
        }

    def finish(self) -> Trained:
        """Scores the held-out replies and some of the training replies, writes the finished model."""
        held_out = self._held_out
        heads = self._scores(held_out.rows)
        scores = held_out.by_record(mean_scores(heads).tolist())
        found = calibration(scores, held_out.by_record(held_out.rows.response_lengths.tolist()))
        some = spread(range(self.data.rows.num_rows), CALIBRATION_REPLIES)
        stats = self._export(mean_scores(self._scores(self.data.rows.take(some))).tolist(), found)
        return Trained(scores, held_out.by_record(heads.tolist()), found, stats)

    def _loss(self, output: tuple[torch.Tensor, torch.Tensor], micro: MicroBatch) -> LossTerms:
        section, judged = self.settings.stage.loss, Judgements.of(micro.columns)
        if self.settings.stage.heads == 1:
            return REWARD_OBJECTIVES[section.name](section, output[1], judged)
        return over_heads(section, output[1], judged, micro.columns["weights"])

    def _scores(self, rows: TokenRows) -> npt.NDArray[np.float64]:
        """Of every row, its score by each head."""
        return row_vectors(
            rows,
            self.learner,
            self.group,
            micro_batch_tokens=self.settings.stage.micro_batch_tokens,
            values=lambda output, micro: output[1].float().reshape(len(micro.rows), -1),
            width=self.settings.stage.heads,
        )

    def _export(self, scores: Sequence[float], found: Calibration) -> RewardStats:
        settings = self.settings

        def complete(unfinished: Path) -> RewardStats:
            self.chat.save(unfinished)
            write_json(unfinished / CALIBRATION_FILE, asdict(found))
            return write_stats(unfinished, scores)

        return make_artifact(self.learner, self.chat, settings.folder, settings.work, self.group, complete)
