"""A rank that dies or stalls in an update ends the others with an error: no rank waits for ever."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch

from actors.learning import distributed, zero
from actors.learning.distributed import Group
from actors.learning.packing import MicroBatch
from tests.deadlines import scaled
from tests.numerics import test_save_and_load as learners
from tests.numerics.ranks import free_port, see_only
from tests.tiny import tiny_llama

STALL_S = scaled(30.0)


def update(rank: int, port: int, causal: Path, told: Path, loss: int, on_gpus: bool) -> None:
    """Rank 1 gets the signal `loss` in the second micro-batch of its second update; rank 0 writes how it ended."""
    if on_gpus:
        see_only(rank)
    zero.PERSISTENT_ELEMENTS = 0
    torch.set_num_threads(1)
    mine = Group(rank, 2, master_port=port, timeout_s=STALL_S)
    distributed.join(mine)
    learner = learners.make(causal, 3, "float32")
    forward, calls = learner._engine.forward, []

    def dying(micro: MicroBatch) -> object:
        calls.append(micro)
        if rank == 1 and len(calls) == LAST_CALL:
            os.kill(os.getpid(), loss)
        return forward(micro)

    learner._engine.forward = dying
    try:
        learners.learn(learner, range(50))
    except Exception as error:  # noqa: BLE001  which one depends on the operation that is reached
        told.write_text(f"{type(error).__name__}: {error}")


LAST_CALL = 4


@pytest.mark.parametrize("loss", [signal.SIGKILL, signal.SIGSTOP])
def test_the_other_rank_ends_with_an_error(tmp_path: Path, loss: signal.Signals) -> None:
    lose(tmp_path, loss)


def lose(tmp_path: Path, loss: signal.Signals, *, on_gpus: bool = False) -> None:
    causal, told, port = tiny_llama(tmp_path / "model"), tmp_path / "told", free_port()
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=update, args=(rank, port, causal, told, loss, on_gpus)) for rank in (0, 1)]
    try:
        for process in ranks:
            process.start()
        ranks[0].join(scaled(300.0))
        assert not ranks[0].is_alive(), "rank 0 waits for a rank that is gone"
        assert told.exists() or ranks[0].exitcode != 0, "rank 0 took 50 updates alone"
    finally:
        for process in ranks:
            process.kill()
            process.join()
