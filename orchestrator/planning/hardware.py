"""Devices: their published peaks, and the fractions of these that similar programs reach.

Sources of the peaks (dense bf16, one device): NVIDIA's data sheets of H100 SXM, H200 SXM, A100 80GB SXM, A800 80GB SXM,
H20 and L40S. Links are one direction: half of NVLink's total, PCIe 4.0 x16 on the L40S; the network is that of a DGX,
one 400 Gb/s adapter per GPU (A100 and A800: 200 Gb/s). Prices are the middle of the on-demand ranges of early 2026 at
pricegpu.pages.dev/blog/h100-vs-a100-cloud-price; without one, no cost is shown unless a price is given.

Sources of the GPU efficiencies, the same for every kind: `learn`, `forward` and `decode` 0.40 (Llama 3, arXiv
2407.21783, table 4: 38 to 43 % on H100); `memory` 0.60 (Databricks, "LLM Inference Performance Engineering": 60 % on
two H100, 55 % on four A100); `decode_step_s` is what TensorRT-LLM 0.5.0's table of Llama 7B at batch 64 leaves over
weights and cache (docs/source/performance.md); `links` 1.0 (verl, docs/advance/one_step_off.md: 7B published in under
0.3 s). Bytes are counted: a micro-batch reads bf16 weights twice (4), writes bf16 gradients (2) and adds them to fp32
ones (10); an optimizer step reads fp32 gradients (4), updates masters (8) and moments (16), writes weights (2).

`cpu-core` is one core of a two-core machine: 0.96 TFLOP/s of bf16 GEMM, 5.6 GB/s copied (so 11.2 GB/s of traffic). Its
other figures except `memory` are fitted to the first halves of four runs: the quickstart, GRPO, half the batch,
responses twice as long (`python -m benchmarks.simulate --calibrate RUN_FOLDER ...` fits them again). `cpu-core, fp32`
is a core of a Zen 3 with AVX2, which reaches 129 GFLOP/s of fp32 GEMM on two cores. With AVX2 kernels a layer of
SmolLM2-135M reached 0.77 to 0.83 of the probe's product in learning, 0.77 to 0.82 forward, 0.59 with 64 rows, on one
thread; less a tenth for the second thread, and heads: 0.68, 0.68, 0.50. Bytes of micro-batches and of the optimizer are
counted; all other figures are those of `cpu-core`. They have not been fitted to runs yet. Fits give the sum of a
micro-batch and an optimizer step; the share of each is a guess. `call_s` is CPU time of the driver per call of a Ray
actor, 0.42 to 0.50 ms over 2,000 and 500 calls to 6 actors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from orchestrator.config.base import Dtype
from orchestrator.errors import ConfigError


@dataclass(frozen=True)
class Efficiency:
    """Achieved fractions of a device's peaks, and fixed costs in seconds.

    Args:
        learn, forward, decode: fraction of peak FLOP/s in learning, in scoring and prefill, and in decoding.
        memory: fraction of memory bandwidth.
        links: fraction of the bandwidth of the links that publish weights.
        decode_step_s: fixed cost of one decoding step: scheduling, kernel launches, sampling.
        micro_batch_bytes, optimizer_bytes: memory traffic per parameter of one micro-batch and of one optimizer step.
        call_s: coordinator's time for one call of one actor.
        step_s: coordinator's time for one step.
    """

    learn: float
    forward: float
    decode: float
    memory: float
    links: float
    decode_step_s: float
    micro_batch_bytes: float = 16.0
    optimizer_bytes: float = 30.0
    call_s: float = 0.0
    step_s: float = 0.0


@dataclass(frozen=True)
class Device:
    """One GPU, or one core of a CPU.

    Args:
        flops: peak FLOP/s without sparsity, on GPUs in bf16.
        bandwidth, link, network, host_link: bytes/s of its memory, to another device of its node, to another node, to
            host memory.
        per_node: devices per node.
        price: US dollars per hour. None: unknown.
    """

    name: str
    flops: float
    bandwidth: float
    memory_bytes: float
    link: float
    network: float
    host_link: float
    efficiency: Efficiency
    per_node: int = 8
    price: float | None = None


_CALL_S = 5e-4
_GPU = Efficiency(learn=0.40, forward=0.40, decode=0.40, memory=0.60, links=1.0, decode_step_s=1e-3, call_s=_CALL_S)
_CPU = Efficiency(
    learn=0.259,
    forward=0.430,
    decode=0.232,
    memory=0.60,
    links=0.0316,
    decode_step_s=0.0443,
    micro_batch_bytes=18.1,
    optimizer_bytes=1.91,
    call_s=_CALL_S,
    step_s=0.196,
)
_CPU_FP32 = replace(_CPU, learn=0.68, forward=0.68, decode=0.50, links=0.0632, micro_batch_bytes=12.0)
_GB = 1e9

CPU_CORE = Device(
    "cpu-core", 0.96e12, 11.2 * _GB, math.inf, 11.2 * _GB, 11.2 * _GB, math.inf, _CPU, per_node=2, price=None
)
CPU_CORES: Mapping[Dtype, Device] = {
    "bfloat16": CPU_CORE,
    "float32": replace(CPU_CORE, name="cpu-core, fp32", flops=65e9, efficiency=_CPU_FP32),
}
DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        Device("h100", 989e12, 3350 * _GB, 80 * _GB, 450 * _GB, 50 * _GB, 64 * _GB, _GPU, price=3.24),
        Device("h200", 989e12, 4800 * _GB, 141 * _GB, 450 * _GB, 50 * _GB, 64 * _GB, _GPU),
        Device("h20", 148e12, 4000 * _GB, 96 * _GB, 450 * _GB, 50 * _GB, 64 * _GB, _GPU),
        Device("a100", 312e12, 2039 * _GB, 80 * _GB, 300 * _GB, 25 * _GB, 32 * _GB, _GPU, price=1.99),
        Device("a800", 312e12, 2039 * _GB, 80 * _GB, 200 * _GB, 25 * _GB, 32 * _GB, _GPU),
        Device("l40s", 362e12, 864 * _GB, 48 * _GB, 32 * _GB, 50 * _GB, 32 * _GB, _GPU),
    )
}


def cpu_core(dtype: Dtype, flops: float) -> Device:
    """A core with a measured FLOP/s in matrix products of this type."""
    return replace(CPU_CORES[dtype], flops=flops)


def device_of(kind: str) -> Device:
    """The device of this name. Raises ConfigError, which lists the known names."""
    try:
        return DEVICES[kind.lower()]
    except KeyError:
        raise ConfigError(f"--gpu-kind={kind!r} is unknown; choose one of {', '.join(DEVICES)}.") from None
