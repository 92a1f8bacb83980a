"""Learners of several ranks, each on its own GPU, connected by NCCL: the bodies that tests/numerics runs over gloo."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.learning import distributed
from tests.numerics import test_partitioned as partitioned
from tests.numerics.ranks import group, run_ranks
from tests.numerics.test_lost_ranks import lose

CLOSE = 1e-3  # relative; two GPUs sum in another order than one
NAMES = ("policy, tied embeddings", "policy, untied, activations recomputed", "critic")
NEEDS_TWO = "NCCL needs a GPU for each rank, and here is one"


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of ZeRO-3 on two ranks, and of stage 0 on one."""
    if torch.cuda.device_count() < 2:
        pytest.skip(NEEDS_TWO)
    place = tmp_path_factory.mktemp("ranks")
    folders = {name: partitioned.CASES[name].folder(place / f"model {name}") for name in NAMES}
    for world in ("one", "two"):
        (place / world).mkdir()
    two = run_ranks(partitioned.measure, 2, folders, place / "two", (3,), on_gpus=True)
    distributed.join(group())
    return {"one": partitioned.measure(group(), folders, place / "one", (0,)), "two": two[0], "other": two[1]}


@pytest.mark.parametrize("name", NAMES)
def test_parameters_in_parts_learn_as_one_rank_does(measured: Any, name: str) -> None:
    found, plain = measured["two"][name, 3], measured["one"][name, 0]
    assert found["share"] <= 0.5
    assert partitioned.closeness(found["gradient"], plain["gradient"]) < CLOSE
    assert found["norm"] == pytest.approx(plain["norm"], rel=CLOSE)
    assert partitioned.closeness(found["output"], plain["output"]) < 10 * CLOSE


@pytest.mark.parametrize("name", NAMES)
def test_gathered_parts_are_published_saved_and_exported_bit_for_bit(measured: Any, name: str) -> None:
    found, plain = measured["two"][name, 3], measured["one"][name, 0]
    assert found["published at the start"] == plain["published at the start"]
    assert found["published"] == measured["other"][name, 3]["published"]
    for tensor, weight in found["weights"].items():
        assert torch.equal(found["resumed"][tensor], weight), tensor
        assert torch.equal(found["exported"][tensor], weight), tensor


@pytest.mark.parametrize("loss", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_peer_ends_the_other_rank_with_an_error(tmp_path: Path, loss: signal.Signals) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(NEEDS_TWO)
    lose(tmp_path, loss, on_gpus=True)
