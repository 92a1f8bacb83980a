"""vLLM plug-in (entry point group `vllm.general_plugins`): registers our weight transfer in every vLLM process."""

from __future__ import annotations

from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.platforms import current_platform

BACKEND = "rlhf-buckets"


def register() -> None:
    """Registers the transfer engine by name, and on CPUs packed weights that can be read; again: does nothing."""
    if current_platform.is_cpu():
        from actors.weights import packed  # noqa: PLC0415 (imports vLLM's kernels, which other platforms lack)

        packed.install()
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "actors.weights.cpu", "BucketTransferEngine")
