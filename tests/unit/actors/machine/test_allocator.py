"""Freed memory of actors is reused without new page faults."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from actors.machine import allocator
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
