"""vLLM plug-in (entry point group `vllm.general_plugins`): registers our weight transfer in every vLLM process."""

from __future__ import annotations

from vllm.distributed.weight_transfer import WeightTransferEngineFactory

BACKEND = "rlhf-buckets"


def register() -> None:
    """Registers the transfer engine by name; calling it again does nothing."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "actors.weights.cpu", "BucketTransferEngine")
