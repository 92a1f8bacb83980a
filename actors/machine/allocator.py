"""Allocators: on CPUs jemalloc from Ray's wheel, because page faults are expensive; on GPUs torch's."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import ray

# Freed pages are kept for some time. Never returning them is worse: micro-batches differ in size, and a reward model's
# training grew from 4 to 11 GB in seven steps and slowed from 500 to 300 tokens/s.
SETTINGS = "oversize_threshold:0,dirty_decay_ms:30000,muzzy_decay_ms:30000"
_NO_BLOCK_BYTES = 1 << 40


def variables() -> dict[str, str]:
    """Environment for a process that uses jemalloc; empty if Ray's wheel has none."""
    library = Path(ray.__file__).parent / "core" / "libjemalloc.so"
    return {"LD_PRELOAD": str(library), "MALLOC_CONF": SETTINGS} if library.exists() else {}


def keep_large_blocks() -> None:
    """Applies the settings to blocks of 8 MiB and more; does nothing in a process without jemalloc.

    In jemalloc up to 5.3.1 the first arena, of a process's first thread, is created before `oversize_threshold` is
    read, and returns such blocks to the system immediately, which causes page faults: 2.1 million in a
    learning step of 3,400 tokens, against 0.3 million. Remove this when Ray's jemalloc has its pull request 2905.
    """
    control = getattr(ctypes.CDLL(None), "mallctl", None)
    if control is not None:
        threshold = ctypes.c_size_t(_NO_BLOCK_BYTES)
        control(b"arena.0.oversize_threshold", None, None, ctypes.byref(threshold), ctypes.sizeof(threshold))


def trim_gpu() -> None:
    """Returns the GPU memory that torch keeps for this process's next tensors; does nothing where it computes on a CPU
    or has no torch."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.cuda.empty_cache()
