"""Checks of stages: whether there are enough prompts."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.prepare import Prepared
from jobs.stages.sample import prompts_of
from jobs.stages.stage import Found
from orchestrator.config.config import Config
from orchestrator.errors import DataError
from orchestrator.types import Prompt

_SHARE = {
    "reward_model": "prompts.reward_model_fraction",
    "held_out": "prompts.held_out_fraction",
    "train": "prompts.held_out_fraction or prompts.reward_model_fraction",
}


def enough_to_sample(config: Config, found: Found) -> None:
    if found.prepared is not None:
        _require(
            found.prepared,
            prompts_of(config, found.prepared),
            f"to sample replies for (sample.split={config.sample.split}): change {_SHARE[config.sample.split]}",
        )


def enough_to_train(config: Config, found: Found) -> None:
    if found.prepared is not None:
        _require(
            found.prepared,
            found.prepared.prompts.train,
            "to train on: lower prompts.held_out_fraction or prompts.reward_model_fraction",
        )


def enough_to_evaluate(config: Config, found: Found) -> None:
    if found.prepared is not None:
        way_out = "for evaluation: raise prompts.held_out_fraction"
        _require(found.prepared, found.prepared.prompts.held_out, way_out)


def _require(prepared: Prepared, prompts: Sequence[Prompt], way_out: str) -> None:
    if not prompts:
        raise DataError(f"of {prepared.report.num_records} prompts none is left {way_out}, or give more prompts.")
