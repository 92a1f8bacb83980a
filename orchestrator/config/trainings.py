"""Sections of stages that train without rollouts, and of their data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

from pydantic import SerializeAsAny

from orchestrator.config.base import (
    ByName,
    NonNegative,
    NonNegativeNumber,
    Positive,
    PositiveNumber,
    Section,
    one_of,
)
from orchestrator.config.losses import PREFERENCE_LOSSES, REWARD_LOSSES, Dpo, Pairwise, PreferenceLoss, RewardLoss
from orchestrator.config.sections import LearnerConfig, TrainingConfig
from orchestrator.data.formats.demonstrations import DEMONSTRATION_FORMATS
from orchestrator.data.formats.documents import DOCUMENT_FORMATS
from orchestrator.data.formats.feedback import LABEL_FORMATS, SCORE_FORMATS
from orchestrator.data.formats.rankings import RANKING_FORMATS


class PreferencesConfig(Section):
    path: Path | None = None
    """Preference file. Null: the labeller ranks replies of the initial policy."""
    format: Annotated[str, one_of({**RANKING_FORMATS, **LABEL_FORMATS, **SCORE_FORMATS}, "auto")] = "auto"
    """Record format (docs/data.md). auto: detected from the first record's fields."""
    limit: Positive | None = None
    """Read at most this many records."""
    held_out: NonNegative | None = None
    """Number of records at the end of the file reserved to measure accuracy, such as a test set that was appended. The
    end of a sorted file is unlike the rest. Null: a tenth of all records, by a hash of the prompt, in any order."""


class DemonstrationsConfig(Section):
    path: Path | None = None
    """Conversations whose replies stage sft learns, or texts that it learns as a whole: JSONL, JSON or Parquet, plain
    or gzip/zstd; a text file."""
    format: Annotated[str, one_of({**DEMONSTRATION_FORMATS, **DOCUMENT_FORMATS}, "auto")] = "auto"
    """Record format (docs/data.md); text and plain are texts, all others conversations. auto: detected from the first
    record's fields, of conversations."""
    limit: Positive | None = None
    """Read at most this many records."""
    held_out: NonNegative | None = None
    """Number of records at the end of the file reserved to measure the loss, such as a test set that was appended. The
    end of a sorted file is unlike the rest. Null: a tenth of all records, by a hash of the conversation, in any
    order."""

    @property
    def are_texts(self) -> bool:
        """Whether the records are texts instead of conversations."""
        return self.format in DOCUMENT_FORMATS


class PtxConfig(Section):
    """The loss on `demonstrations` that reinforcement learning mixes in (PPO-ptx, Ouyang 2022, eq. 2)."""

    coefficient: NonNegativeNumber = 0.0
    """Weight of the mean negative log-likelihood of a learned token of demonstrations. 0: none is mixed in."""
    records: Positive = 8
    """Rows of demonstrations per optimizer step of the policy."""


class OfflineConfig(TrainingConfig):
    """The keys of every stage that trains on a dataset, without rollouts."""

    epochs: Positive = 1
    """Passes over the data."""
    records_per_batch: Positive = 8
    """Records per optimizer step: conversations, or prompts with all their replies."""
    learning_rate: PositiveNumber = 1e-5
    """Peak learning rate. Linear warm-up over a tenth of the steps, then linear decay."""
    weight_decay: NonNegativeNumber = 0.0
    """AdamW weight decay."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: saves memory, takes a third more time."""
    max_length: Positive = 512
    """Longest record in tokens."""
    cpus_per_rank: Positive | None = None
    """CPU threads of one rank. Null: the node's cores divided among its ranks."""
    checkpoint_every_steps: NonNegative = 25
    """Optimizer steps between checkpoints, from which training continues after a failure. A checkpoint takes up to 16
    bytes per parameter. Only the newest is kept, and it is deleted when training ends. 0: none."""

    def num_steps(self, num_records: int) -> int:
        """Optimizer steps of all epochs."""
        return self.epochs * math.ceil(num_records / self.records_per_batch)

    def learner(self, optimizer_steps: int) -> LearnerConfig:
        """The learner's config for training of this length: linear warm-up over a tenth, then linear decay."""
        keys = (*TrainingConfig.model_fields, "weight_decay", "gradient_checkpointing")
        shared = {key: getattr(self, key) for key in keys}
        return LearnerConfig(**shared, schedule="linear", warmup_optimizer_steps=optimizer_steps // 10)


class RewardModelConfig(OfflineConfig):
    loss: Annotated[SerializeAsAny[RewardLoss], ByName(REWARD_LOSSES, default="pairwise")] = Pairwise()
    base: str | None = None
    """Initial model of the reward model. Null: the policy."""
    heads: Positive = 1
    """Number of scalar heads on the model. The score is their mean; with several, each has its own random start and its
    own random weights of the prompts, and their standard deviation is the disagreement."""
    layers: Positive | None = None
    """Number of layers to keep, counted from the input. Null: all. A shallow reward model trains and scores faster; few
    layers suffice for surface properties such as tone."""
    max_length: Positive = 512
    """Longer transcripts are cut at the start and counted."""


class SftConfig(OfflineConfig):
    learning_rate: PositiveNumber = 2e-5
    """Peak learning rate. Linear warm-up over a tenth of the steps, then linear decay."""
    max_length: Positive = 512
    """Maximum length of a row, in tokens. Longer conversations are split before user turns, so that every reply is
    learned once; a single exchange that is longer is cut at its end. Both are counted."""
    neftune_alpha: NonNegativeNumber = 0.0
    """Size of noise on the embeddings, which can make replies better and longer (NEFTune, Jain 2023: 5 to 15)."""


class PreferenceConfig(OfflineConfig):
    loss: Annotated[SerializeAsAny[PreferenceLoss], ByName(PREFERENCE_LOSSES, default="dpo")] = Dpo()
    learning_rate: PositiveNumber = 1e-6
    """Peak learning rate. Linear warm-up over a tenth of the steps, then linear decay."""
    max_length: Positive = 512
    """Longer transcripts are cut at the start and counted."""
