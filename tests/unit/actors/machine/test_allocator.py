"""Freed memory of actors is reused without new page faults, and that of GPUs is given back."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import ray
import torch

from actors.groups.process import Process
from actors.machine import allocator
from actors.weights.sender import PublishingPolicy
from tests.deadlines import scaled

BLOCK_BYTES, TIMES, PAGE_BYTES = 32 << 20, 20, 4096
_CODE = f"""
import resource
import torch
from actors.machine.allocator import keep_large_blocks

keep_large_blocks()
torch.set_num_threads(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({TIMES}):
    torch.empty({BLOCK_BYTES}, dtype=torch.uint8).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_a_large_block_is_faulted_in_once() -> None:
    variables = allocator.variables()
    if not variables:
        pytest.skip("this build of Ray brings no jemalloc")
    done = subprocess.run(
        [sys.executable, "-c", _CODE],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=True,
        timeout=scaled(120),
    )
    assert int(done.stdout) < 3 * BLOCK_BYTES / PAGE_BYTES, "blocks are returned to the system immediately"


def test_without_jemalloc_nothing_happens() -> None:
    allocator.keep_large_blocks()


def test_a_gpu_gets_memory_back_where_torch_is_loaded_and_torch_is_not_loaded_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("emptied"))
    allocator.trim_gpu()
    assert calls == ["emptied"]
    monkeypatch.delitem(sys.modules, "torch")
    allocator.trim_gpu()
    assert calls == ["emptied"]
    assert "torch" not in sys.modules


def test_memory_is_given_back_after_a_start_and_after_a_publish(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("emptied"))
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "node"))
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.1")
    Process().ready()
    assert len(calls) == 1
    PublishingPolicy.__new__(PublishingPolicy).end_publish()
    assert len(calls) == 2
