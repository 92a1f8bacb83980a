"""vLLM plug-in (entry point group `vllm.general_plugins`): registers our weight transfer in every vLLM process."""

from __future__ import annotations

from collections.abc import Mapping

from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.platforms import current_platform

CPU_BACKEND = "rlhf-buckets"
GPU_BACKENDS: Mapping[str, str] = {"separate": "rlhf-nccl", "colocated": "rlhf-ipc"}
_ENGINES: Mapping[str, tuple[str, str]] = {
    CPU_BACKEND: ("actors.weights.cpu", "BucketTransferEngine"),
    GPU_BACKENDS["separate"]: ("actors.weights.gpu", "VerifiedNccl"),
    GPU_BACKENDS["colocated"]: ("actors.weights.gpu", "VerifiedIpc"),
}


def register() -> None:
    """Registers the transfer engines by name, and on CPUs packed weights that can be read; again: does nothing."""
    if current_platform.is_cpu():
        from actors.weights import packed  # noqa: PLC0415 (imports vLLM's kernels, which other platforms lack)

        packed.install()
    for name, (module, engine) in _ENGINES.items():
        if name not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(name, module, engine)
