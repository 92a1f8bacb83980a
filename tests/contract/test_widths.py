"""Which numbers of workers divide a model: our rule, written from vLLM's sources, against the layers that refuse."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.layers import linear, vocab_parallel_embedding

from orchestrator.planning.widths import Divided

WIDTHS = (1, 2, 3, 4, 6, 8, 12)


def is_built(divided: Divided) -> bool:
    """By the layers of one worker: attention, an MLP, the embedding."""
    try:
        linear.QKVParallelLinear(16, 8, divided.heads, divided.kv_heads, bias=False)
        for _, size in divided.inner:
            linear.MergedColumnParallelLinear(16, [size, size], bias=False)
            linear.RowParallelLinear(size, 16, bias=False)
        vocab_parallel_embedding.VocabParallelEmbedding(divided.vocabulary, 16)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("width", WIDTHS)
def test_the_widths_that_we_refuse_are_those_that_vllm_refuses(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    group = SimpleNamespace(world_size=width, rank_in_group=0)
    monkeypatch.setattr(parallel_state, "get_tp_group", lambda: group)
    found = set()
    with set_current_vllm_config(VllmConfig()), torch.device("meta"):
        for heads, kv_heads, inner, vocabulary in product((9, 12, 24), (1, 2, 4, 6), (36, 96), (64, 150, 385)):
            divided = Divided(heads, kv_heads, (("intermediate_size", inner),), vocabulary)
            assert divided.divides(width) == is_built(divided), divided
            found.add(divided.divides(width))
    assert found == ({True} if width == 1 else {True, False})
