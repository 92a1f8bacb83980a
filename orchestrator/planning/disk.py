"""Disk space of stages, in bytes."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.config.sections import TrainingConfig
from orchestrator.planning.memory import ModelSize

LOGGED_BYTES_PER_TOKEN = 40  # token id and some eight floats, before compression
SAVED_BYTES_PER_PARAM = 14  # weights, masters, two moments
EXPORTED_BYTES_PER_PARAM = 4
STORED_BYTES_PER_TOKEN = 5  # token id and mark
STORED_BYTES_PER_ROW = 40  # where it ends, its quality, its strength and its record


@dataclass(frozen=True)
class Disk:
    """`kept` stays after the stage; `working` is freed at its end."""

    kept: float = 0.0
    working: float = 0.0


def learned_params(size: ModelSize, section: TrainingConfig) -> int:
    """The parameters that learn and are saved: all, or those of adapters."""
    return size.adapter_params(section.lora) if section.lora.rank else size.num_params


def training_disk(num_params: int, num_saved: int) -> Disk:
    """Of a training without rollouts: its model and, if it saves any parameters, its last checkpoint and the next."""
    return Disk(EXPORTED_BYTES_PER_PARAM * num_params, 2 * SAVED_BYTES_PER_PARAM * num_saved)


def rows_disk(num_tokens: float, num_rows: float) -> Disk:
    """Of rows of tokens that a training reads (actors/training/stored_rows.py)."""
    return Disk(working=STORED_BYTES_PER_TOKEN * num_tokens + STORED_BYTES_PER_ROW * num_rows)


def samples_disk(num_samples: int, max_length: int) -> Disk:
    return Disk(num_samples * max_length * LOGGED_BYTES_PER_TOKEN)
