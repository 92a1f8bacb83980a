"""vLLM plug-in (entry point group `vllm.general_plugins`): makes our weight transfer known in every vLLM process."""

from __future__ import annotations

from vllm.distributed.weight_transfer import WeightTransferEngineFactory

from actors.weights import cpu


def register() -> None:
    """Registers the transfer engines; calling it again does nothing."""
    if cpu.BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(cpu.BACKEND, cpu.BucketTransferEngine)
