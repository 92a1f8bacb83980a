"""Checks of stages: whether there are enough prompts."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.prepare import Prepared
from jobs.stages.stage import Found
from orchestrator.config.config import Config
from orchestrator.errors import DataError
from orchestrator.types import Prompt


def enough_to_label(config: Config, found: Found) -> None:
    if found.prepared is not None:
        _require(
            found.prepared,
            found.prepared.prompts.reward_model,
            "for the labeller: raise prompts.reward_model_fraction",
        )


def enough_to_train(config: Config, found: Found) -> None:
    if found.prepared is not None:
        _require(
            found.prepared,
            found.prepared.prompts.train,
            "to train on: lower prompts.held_out_fraction or prompts.reward_model_fraction",
        )


def _require(prepared: Prepared, prompts: Sequence[Prompt], way_out: str) -> None:
    if not prompts:
        raise DataError(f"of {prepared.report.num_records} prompts none is left {way_out}, or give more prompts.")
