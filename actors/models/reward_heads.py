"""The heads of a reward model: one, or an ensemble on one trunk, whose mean is the score.

An ensemble is an ordinary sequence classifier with a label per head. An entry in its config.json, which only training
writes, tells it from a classifier with several labels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from orchestrator.errors import DataError

HEADS_ENTRY = "rlhf_reward_heads"


def num_heads(config: Any) -> int:
    """Number of reward heads of a model, by its config; 1 for all models that are not ensembles.

    Raises:
        DataError: the entry is no number of heads.
    """
    found = getattr(config, HEADS_ENTRY, 1)
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise DataError(
            f"{config.name_or_path}/config.json: {HEADS_ENTRY} must be a number of heads, found {found!r}. Remove the "
            "entry, or train the reward model again."
        )
    return found


def with_heads(model: Any, count: int) -> torch.nn.Linear:
    """The model's head, replaced by an uninitialised one where the number of heads is another."""
    old: torch.nn.Linear = model.score
    if old.out_features == count:
        return old
    model.score = torch.nn.Linear(old.in_features, count, bias=old.bias is not None).to(old.weight.dtype)
    model.num_labels = model.config.num_labels = count
    if count > 1:
        setattr(model.config, HEADS_ENTRY, count)
    else:
        delattr(model.config, HEADS_ENTRY)
    return model.score


def fold_heads(model: Any) -> None:
    """Replaces the heads by one, their mean: its score is the mean of their scores."""
    old: torch.nn.Linear = model.score
    folded = with_heads(model, 1)
    with torch.no_grad():
        folded.weight.copy_(old.weight.float().mean(0, keepdim=True))
        if old.bias is not None:
            folded.bias.copy_(old.bias.float().mean(0, keepdim=True))


def require_heads(there: int, wanted: int, folder: Path) -> None:
    """Raises DataError if a model with `there` heads can't start the training of `wanted` heads. One head can start as
    the mean of several; several need as many, because equal copies would differ in nothing."""
    if wanted not in (1, there):
        raise DataError(
            f"{folder} is a reward model with {there} head{'s' if there > 1 else ''}, and reward_model.heads={wanted}. "
            f"Set reward_model.heads={there}, or give a reward_model.base without a reward head."
        )
