"""vLLM plug-in (entry point group `vllm.general_plugins`): registers our weight transfer in every vLLM process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.platforms import current_platform
from vllm.triton_utils import dispatcher

BACKEND = "rlhf-buckets"


def register() -> None:
    """Registers the transfer engine by name, and on CPUs packed weights that can be read; again: does
    nothing."""
    if BACKEND in WeightTransferEngineFactory._registry:
        return
    if current_platform.is_cpu():
        from actors.weights import packed  # noqa: PLC0415 (imports vLLM's kernels, which other platforms lack)

        packed.install()
        _skip_ranks()
        dispatcher._rebind_kernels = _without_llvmlite(dispatcher._rebind_kernels)
    WeightTransferEngineFactory.register_engine(BACKEND, "actors.weights.cpu", "BucketTransferEngine")


def _skip_ranks() -> None:
    """Sets the rank of each sampled token to 1, because it is not used.

    vLLM 0.32 computes ranks with a kernel that torch compiles from C++ during the first batch: 2 s with a warm
    cache, and it needs a compiler. Remove this when SamplingParams.logprobs can omit ranks.
    """
    from vllm.v1.sample import sampler  # noqa: PLC0415 (vLLM calls this module while it is being imported)

    sampler.batched_count_greater_than = lambda logprobs, chosen: chosen.new_ones(len(chosen), dtype=torch.int64)


def _without_llvmlite(rebind: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM 0.32 looks into all loaded modules for kernels that it replaces on CPUs, and fails at an object of llvmlite
    whose `__dict__` is no dictionary. numba loads it for our digests. Remove this when _rebind_kernels skips such
    objects."""

    @wraps(rebind)
    def rebind_others(*arguments: Any) -> None:
        hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("llvmlite.binding")}
        try:
            rebind(*arguments)
        finally:
            sys.modules.update(hidden)

    return rebind_others
