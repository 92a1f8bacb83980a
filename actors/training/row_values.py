"""Numbers about the rows of a table, from forwards without gradient that all ranks share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from actors.learning.distributed import Group, from_all
from actors.learning.learner import Learner
from actors.learning.packing import MicroBatch, TokenRows
from actors.learning.worker import Share, answers

PLANNED_ROWS = 2**17  # rows whose micro-batches are planned together; a plan takes some 250 bytes a row


def row_values(
    rows: TokenRows,
    learner: Learner,
    group: Group,
    *,
    micro_batch_tokens: int,
    shares_prompts: bool = False,
    values: Callable[[Any, MicroBatch], torch.Tensor],
) -> npt.NDArray[np.float64]:
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
        width=1,
    )
    return found[:, 0]


def row_vectors(
    rows: TokenRows,
    learner: Learner,
    group: Group,
    *,
    micro_batch_tokens: int,
    shares_prompts: bool = False,
    values: Callable[[Any, MicroBatch], torch.Tensor],
    width: int,
) -> npt.NDArray[np.float64]:
    """As `row_values`, of `width` numbers per row."""
    found = np.zeros((rows.num_rows, width), dtype=np.float64)
    for start in range(0, rows.num_rows, PLANNED_ROWS):
        mine: list[int] = []
        computed: list[list[float]] = []
        for micro, output in answers(
            rows,
            learner.pass_through,
            Share(group.rank, group.world_size),
            micro_batch_tokens=micro_batch_tokens,
            device=learner.device,
            shares_prompts=shares_prompts,
            part=range(start, min(start + PLANNED_ROWS, rows.num_rows)),
        ):
            mine += micro.rows
            computed += values(output, micro).cpu().tolist()
        those = np.array(mine, dtype=np.int64), np.array(computed, dtype=np.float64).reshape(len(mine), width)
        for numbers, of_rank in from_all(those, group):
            found[numbers] = of_rank
    return found
