"""Process groups of learners: one process per rank, gloo on CPUs and NCCL on GPUs, through DeepSpeed."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

# DeepSpeed reads this at import; on a machine without GPUs its own detection warns and may be wrong.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed as deepspeed
import torch.distributed as dist
from deepspeed.ops import __compatible_ops__
from deepspeed.runtime import compiler

from actors.learning import precision
from actors.machine.devices import compute_device, require_usable
from actors.machine.network import interface_towards
from orchestrator.errors import RlhfError

Result = TypeVar("Result")

# Otherwise the CPU backend compiles a shared-memory all-reduce with g++ at its start (50 s, and not on every image);
# gloo does the same work.
_COMPILED_ON_START = "deepspeed_shm_comm"

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# Raised inside DeepSpeed at every ZeRO-3 reduction; nothing here can act on it.
warnings.filterwarnings("ignore", message=".*reduce_scatter_tensor.*", category=FutureWarning)
warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)


@dataclass(frozen=True)
class Group:
    """The place of one learner process in its group.

    Args:
        master_addr, master_port: address at which rank 0 listens.
        timeout_s: deadline of each collective, after which gloo and NCCL raise.
        threads: CPU threads of this process.
    """

    rank: int = 0
    world_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    timeout_s: float = 600.0
    threads: int = 1

    @property
    def device(self) -> torch.device:
        return compute_device()


def join(group: Group) -> None:
    """Joins the process group. Returns when all ranks have joined.

    Raises:
        CapacityError: torch can't use the GPUs that this process was given.
        torch.distributed.DistError: the others did not join within `timeout_s`.
    """
    require_usable()
    torch.set_num_threads(group.threads)
    precision.settle()
    os.environ |= {
        "RANK": str(group.rank),
        "WORLD_SIZE": str(group.world_size),
        "LOCAL_RANK": "0",
        "MASTER_ADDR": group.master_addr,
        "MASTER_PORT": str(group.master_port),
    }
    interface = interface_towards(group.master_addr) if group.world_size > 1 else None
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    __compatible_ops__[_COMPILED_ON_START] = False
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(
        dist_backend=backend, auto_mpi_discovery=False, timeout=timedelta(seconds=group.timeout_s), verbose=False
    )


def initialize(**arguments: Any) -> deepspeed.DeepSpeedEngine:
    """A DeepSpeed engine, in a process that has joined a group.

    Redirects stdout, which belongs to the job: some of DeepSpeed's optimizers print memory reports.
    """
    _import_muon()
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(dist_init_required=False, **arguments)
    return engine


def _import_muon() -> None:
    """Imports DeepSpeed's Muon without compiling it.

    DeepSpeed 0.19 imports it for every engine, for a type check of the optimizer; its decorators load torch's whole
    compiler, which takes 1.6 s. We do not use it. Remove this when DeepSpeed compiles it on first use.
    """
    compile_, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compile_


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def reduce_sums(sums: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Sums named numbers over all ranks, in float64. All ranks must have the same names."""
    return _reduce(sums, device, dist.ReduceOp.SUM)


def reduce_maxima(maxima: Mapping[str, float], device: torch.device) -> dict[str, float]:
    return _reduce(maxima, device, dist.ReduceOp.MAX)


def _reduce(numbers: Mapping[str, float], device: torch.device, operation: dist.ReduceOp.RedOpType) -> dict[str, float]:
    names = sorted(numbers)
    packed = torch.tensor([numbers[name] for name in names], dtype=torch.float64, device=device)
    if names:
        dist.all_reduce(packed, op=operation)
    return dict(zip(names, packed.tolist(), strict=True))


def all_or_none(work: Callable[[], Result], group: Group) -> Result:
    """Runs `work` on all ranks. If it fails on one, all ranks raise its error, so that no rank waits forever.

    `work` must not make collective calls: a failing rank would leave the others waiting.
    """
    results: list[Result] = []
    problem: RlhfError | None = None
    try:
        results.append(work())
    except RlhfError as error:
        problem = error
    for found in from_all(problem, group):
        if found is not None:
            raise found
    return results[0]


def on_rank_0(work: Callable[[], Result], group: Group) -> Result:
    """Runs `work` on rank 0. All ranks return its (small) result or raise its error."""
    mine = all_or_none(lambda: work() if group.rank == 0 else None, group)
    result: Result = from_all(mine, group)[0]
    return result


def from_all(value: Any, group: Group) -> list[Any]:
    """The values of all ranks. A single rank needs no process group."""
    if group.world_size == 1:
        return [value]
    values: list[Any] = [None] * group.world_size
    dist.all_gather_object(values, value)
    return values
