"""Numbers about the rows of a table, from forwards without gradient that all ranks share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from actors.learning.distributed import Group, from_all
from actors.learning.learner import Learner
from actors.learning.packing import MicroBatch, TokenRows
from actors.learning.worker import Share, answers


def row_values(
    rows: TokenRows,
    learner: Learner,
    group: Group,
    *,
    micro_batch_tokens: int,
    shares_prompts: bool = False,
    values: Callable[[Any, MicroBatch], torch.Tensor],
) -> list[float]:
    """Collective. Every rank returns one number per row.

    Args:
        values: (model output, micro-batch) -> one number per row of the micro-batch.
    """
    found = row_vectors(
        rows,
        learner,
        group,
        micro_batch_tokens=micro_batch_tokens,
        shares_prompts=shares_prompts,
        values=lambda output, micro: values(output, micro).unsqueeze(-1),
    )
    return [value for (value,) in found]


def row_vectors(
    rows: TokenRows,
    learner: Learner,
    group: Group,
    *,
    micro_batch_tokens: int,
    shares_prompts: bool = False,
    values: Callable[[Any, MicroBatch], torch.Tensor],
) -> list[list[float]]:
    """As `row_values`, of several numbers per row."""
    if not rows.num_rows:
        return []
    mine: dict[int, list[float]] = {}
    for micro, output in answers(
        rows,
        learner.pass_through,
        Share(group.rank, group.world_size),
        micro_batch_tokens=micro_batch_tokens,
        device=learner.device,
        shares_prompts=shares_prompts,
    ):
        mine |= dict(zip(micro.rows, values(output, micro).cpu().tolist(), strict=True))
    found = {row: value for part in from_all(mine, group) for row, value in part.items()}
    return [found[row] for row in range(rows.num_rows)]
