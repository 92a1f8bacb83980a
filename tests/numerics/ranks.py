"""Runs a function in several processes connected by gloo, or by NCCL if each has a GPU."""

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from actors.learning import distributed
from actors.learning.distributed import Group
from actors.learning.worker import RankContext
from orchestrator.algorithms.algorithm import Algorithm
from orchestrator.config.base import Dtype
from orchestrator.config.sections import ModelConfig
from tests.deadlines import scaled
from tests.ports import free_port


def group(rank: int = 0, world_size: int = 1, port: int | None = None) -> Group:
    return Group(rank, world_size, master_port=port or free_port(), timeout_s=scaled(100.0))


def context(folder: Path, algorithm: Algorithm, *, dtype: Dtype, **changes: Any) -> RankContext:
    """The context of a worker of the model in `folder`; `changes` are fields of the context."""
    model = ModelConfig(path=str(folder), dtype=dtype)
    fixed = {"template": None, "temperature": 1.0, "seed": 0, "total_optimizer_steps": 1, "max_new_tokens": 16}
    fields = {**fixed, **changes}
    return RankContext(model=model, algorithm=algorithm, cache=folder, **fields)


def run_ranks(function: Any, world_size: int, *arguments: Any, on_gpus: bool = False) -> list[Any]:
    """Runs function(rank's Group, *arguments) on all ranks; returns their results (through torch.save).

    Args:
        on_gpus: rank i sees GPU i and no other, as an actor does.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_run, (world_size, port, folder, on_gpus, function, arguments), nprocs=world_size)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def by_world(function: Any, folders: pytest.TempPathFactory, base: Path, cases: Any, *, of_two: Any = None) -> Any:
    """Results of function(Group, base, folder, cases) by the number of ranks: "two", of the first rank, and "one".

    Args:
        of_two: the cases of two ranks, if they are others.
    """
    distributed.join(group())
    two = run_ranks(function, 2, base, folders.mktemp("two"), cases if of_two is None else of_two)
    return {"one": function(group(), base, folders.mktemp("one"), cases), "two": two[0]}


def see_only(gpu: int) -> None:
    """To be called before CUDA starts in this process."""
    os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)


def _run(
    rank: int, world_size: int, port: int, folder: str, on_gpus: bool, function: Any, arguments: tuple[Any, ...]
) -> None:
    if on_gpus:
        see_only(rank)
    mine = group(rank, world_size, port)
    distributed.join(mine)
    torch.save(function(mine, *arguments), Path(folder) / f"{rank}.pt")
    distributed.leave()
