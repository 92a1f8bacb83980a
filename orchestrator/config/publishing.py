"""The config section of publishing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from orchestrator.config.base import Positive, Section
from orchestrator.config.sections import PlacementConfig, PolicyConfig, RolloutConfig


class PublishConfig(Section):
    bucket_mib: Positive = 32
    """Size of the flat buckets in which weights are sent. Transports other than host enlarge it to the largest
    tensor."""
    transport: Literal["auto", "host", "collective", "shared"] = "auto"
    """How buckets get to the engines. host: Ray's object store. collective: broadcast from the policy's rank 0 (NCCL
    between GPUs, gloo between CPUs). shared: memory that both map (CUDA IPC on one GPU). auto: collective or shared
    if policy and engines are on separate or on the same GPUs, shared on the CPUs of a single host, otherwise host.
    What fails goes through the host."""
    verify: Literal["full", "sampled", "checksums"] = "full"
    """Verification after publishing: read back all weights that the layers use, a random part of them, or checksums."""

    def contradictions(self, policy: PolicyConfig, rollout: RolloutConfig, placement: PlacementConfig) -> Iterator[str]:
        if self.transport in ("auto", "host"):
            return
        sides = policy.gpus_per_rank > 0, rollout.on_gpus
        if sides[0] != sides[1]:
            yield (
                f"publish.transport={self.transport} needs policy and engines on devices of one kind: the policy is on "
                f"{_kind(sides[0])}, the engines on {_kind(sides[1])}. "
                "Set publish.transport=auto."
            )
        wants_shared, are_shared = self.transport == "shared", placement.mode == "colocated"
        if all(sides) and wants_shared != are_shared:
            needed = "colocated" if wants_shared else "separate or mixed"
            reason = "no GPU is shared" if wants_shared else "NCCL can't serve two processes on one GPU"
            yield (
                f"publish.transport={self.transport} needs placement.mode={needed} on GPUs, got {placement.mode}: "
                f"{reason}. Set publish.transport=auto."
            )


def _kind(on_gpus: bool) -> str:
    return "GPUs" if on_gpus else "CPUs"
