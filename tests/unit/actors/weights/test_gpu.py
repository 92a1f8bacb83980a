from __future__ import annotations

from typing import Any

import pytest
import torch

from actors.weights.digest import digest
from actors.weights.gpu import ChecksummedSource, EngineFanOut
from actors.weights.manifest import plan


class Recording:
    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.calls.append(("init", init_info))

    def start_weight_update(self) -> None:
        self.calls.append(("start", None))

    def update_weights(self, update_info: Any) -> None:
        self.calls.append(("update", update_info))

    def finish_weight_update(self) -> None:
        self.calls.append(("finish", None))


class Failing(Recording):
    def update_weights(self, update_info: Any) -> None:
        raise ConnectionError("engine is gone")


def test_every_worker_of_every_engine_gets_a_rank_of_its_own() -> None:
    engines = [Recording(), Recording(), Recording()]
    client = EngineFanOut(engines, workers_per_engine=2)
    client.init_weight_transfer_engine({"rank_offset": 1, "world_size": 7})
    client.start_weight_update()
    client.update_weights({"names": ["a"]})
    client.finish_weight_update()
    assert [engine.calls[0][1]["rank_offset"] for engine in engines] == [1, 3, 5]
    assert all([name for name, _ in engine.calls] == ["init", "start", "update", "finish"] for engine in engines)


def test_an_engine_that_fails_fails_the_publish() -> None:
    client = EngineFanOut([Recording(), Failing()], workers_per_engine=1)
    with pytest.raises(ConnectionError, match="engine is gone"):
        client.update_weights({})


def test_a_source_sends_the_planned_dtype_and_keeps_checksums_of_what_it_sent() -> None:
    masters = {"a": torch.randn(3, 4), "b": torch.randn(5)}
    header = plan(((name, torch.bfloat16, t.shape) for name, t in masters.items()), bucket_bytes=64)
    source = ChecksummedSource(header, lambda: iter(masters.items()))
    sent = dict(source)
    assert [(meta.name, meta.dtype, meta.shape) for meta in source.metadata()] == [
        ("a", torch.bfloat16, (3, 4)),
        ("b", torch.bfloat16, (5,)),
    ]
    assert all(torch.equal(sent[name], tensor.to(torch.bfloat16)) for name, tensor in masters.items())
    assert source.checksums == {name: digest(tensor, name).hex for name, tensor in sent.items()}
