"""Estimates the memory that a placement plan needs from sizes, before any model is loaded.

`state` follows from the settings: if it does not fit, the run can't start. Together with process overhead it was within
a fifth of the measured memory of learners on CPUs between steps. `working` (activations of one micro-batch, logits of
one chunk, temporaries of the optimizer) is needed in addition while a role computes; it was not measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from orchestrator.config.base import Dtype
from orchestrator.config.sections import LoraConfig
from orchestrator.errors import CapacityError
from orchestrator.planning.placement import Plan, Slot

MIB = 1 << 20
GIB = 1 << 30

# Resident memory of a process that has only imported its libraries (measured on a CPU).
LEARNER_PROCESS = 620 * MIB
SCORER_PROCESS = 560 * MIB
RULES_PROCESS = 490 * MIB
ENGINE_PROCESS = 820 * MIB
RECORDER_PROCESS = 350 * MIB
COORDINATOR_PROCESS = 590 * MIB
RAY_PROCESSES = 700 * MIB  # of one node: raylet and agents, on the head also its servers

LOGIT_CHUNK = 512  # positions whose logits a learner or the reference holds at a time

BYTES_OF: Mapping[Dtype, int] = {"bfloat16": 2, "float32": 4}
_MOMENTS, _MASTERS = 8, 4  # bytes per parameter of Adam's two moments and of master weights, in fp32
AVERAGE_BYTES = 4  # bytes per parameter of a moving average, in fp32 on the host of rank 0
_ADAM_TEMPORARIES = 8  # bytes per parameter of a shard during its update
_ALIVE_IN_BACKWARD = (10, 4)  # values per token and layer that a Llama stores: × hidden size, × feed-forward size
_LOGIT_COPIES = 4
QUANTISED_BLOCKS: Mapping[int, int] = {4: 64, 8: 256}
"""Weights per scale, by the bits of a weight."""


@dataclass(frozen=True)
class ModelSize:
    """The sizes that determine a model's memory. `feed_forward` is the inner width of its MLP.

    Args:
        linear: the decoder's linear layers: (last part of the name, number of these, inputs, outputs).
        trunk_bits: of their weights, if these are quantised.
    """

    num_params: int
    num_layers: int
    hidden: int
    feed_forward: int
    vocabulary: int
    linear: tuple[tuple[str, int, int, int], ...] = field(default=(), kw_only=True)
    trunk_bits: int | None = field(default=None, kw_only=True)

    def frozen_bytes(self, held: int) -> float:
        """Weights that do not learn, with `held` bytes per parameter where they are not quantised."""
        if self.trunk_bits is None:
            return held * self.num_params
        quantised = sum(count * inputs * outputs for _, count, inputs, outputs in self.linear)
        per_weight = self.trunk_bits / 8 + 4 / QUANTISED_BLOCKS[self.trunk_bits]
        return per_weight * quantised + held * (self.num_params - quantised)

    def adapter_params(self, lora: LoraConfig) -> int:
        """Parameters of the adapters that a config puts on this model; 0 without adapters."""
        if not lora.rank:
            return 0
        return sum(
            count * (lora.rank * (inputs + outputs) + (outputs if lora.dora else 0))
            for name, count, inputs, outputs in self.linear
            if not lora.targets or name in lora.targets
        )


@dataclass(frozen=True)
class Memory:
    """Bytes of one process. `process` is on the host; the rest is on the device, if there is one."""

    state: float = 0.0
    working: float = 0.0
    cache: float = 0.0
    process: float = 0.0

    @property
    def on_device(self) -> float:
        return self.state + self.working + self.cache

    @property
    def on_cpu(self) -> float:
        """Total of a process without a device."""
        return self.on_device + self.process


def in_one_process(models: Sequence[Memory]) -> Memory:
    """Models that one process holds together and uses one after the other."""
    return Memory(
        sum(model.state for model in models),
        max(model.working for model in models),
        sum(model.cache for model in models),
        max(model.process for model in models),
    )


def effective_zero_stage(zero_stage: int, *, dtype: Dtype, ranks: int) -> int:
    """The stage that a learner uses: 0 instead of 1 and 2 on a single rank in fp32, which has nothing to shard and no
    master weights. These stages would only copy gradients and weights."""
    return 0 if ranks == 1 and dtype == "float32" and zero_stage < 3 else zero_stage


def learner_memory(
    size: ModelSize,
    *,
    dtype: Dtype,
    zero_stage: int,
    ranks: int,
    micro_batch_tokens: int,
    gradient_checkpointing: bool,
    logits: bool,
    adapters: int = 0,
) -> Memory:
    """One rank of a policy or a critic (`logits` off) under ZeRO (Rajbhandari 2020, section 3).

    Stage 1 shards moments and master weights, stage 2 also gradients, stage 3 also weights.

    Args:
        adapters: parameters of adapters, which then learn instead of the model's own; 0: there are none.
    """
    held, zero_stage = BYTES_OF[dtype], effective_zero_stage(zero_stage, dtype=dtype, ranks=ranks)
    learned = adapters or size.num_params
    state = learned_bytes(learned, dtype=dtype, zero_stage=zero_stage, ranks=ranks)
    if adapters:
        state += size.frozen_bytes(held) / (ranks if zero_stage == 3 else 1)
    temporaries = _ADAM_TEMPORARIES * learned / (ranks if zero_stage else 1)
    layers = 1 if gradient_checkpointing else size.num_layers
    working = (
        temporaries
        + layers * _layer_bytes(size, dtype, micro_batch_tokens)
        + (size.num_layers * size.hidden * micro_batch_tokens * held if gradient_checkpointing else 0)
        + (held * max(i * o for _, _, i, o in size.linear) if size.trunk_bits else 0)  # one layer, dequantised
        + (_logit_bytes(size, micro_batch_tokens) if logits else 0)
        + (4 * size.vocabulary * size.hidden if logits and not adapters else 0)
    )
    return Memory(state, working, process=LEARNER_PROCESS)


def on_trunk_memory(adapters: int, *, dtype: Dtype, zero_stage: int, ranks: int) -> Memory:
    """What a critic or a reference adds to a rank of the policy whose trunk it shares."""
    return Memory(learned_bytes(adapters, dtype=dtype, zero_stage=zero_stage, ranks=ranks))


def learned_bytes(num_params: float, *, dtype: Dtype, zero_stage: int, ranks: int) -> float:
    """Weights that learn, with their gradients, masters and moments, on one rank."""
    held, zero_stage = BYTES_OF[dtype], effective_zero_stage(zero_stage, dtype=dtype, ranks=ranks)
    optimizer = _MOMENTS + (_MASTERS if dtype == "bfloat16" or zero_stage else 0)
    gradients = held + (4 if dtype == "bfloat16" and zero_stage else 0)
    per_param = (
        held / (ranks if zero_stage == 3 else 1)
        + gradients / (ranks if zero_stage >= 2 else 1)
        + optimizer / (ranks if zero_stage else 1)
    )
    return per_param * num_params


def scorer_memory(size: ModelSize, *, dtype: Dtype, shards: int, micro_batch_tokens: int, logits: bool) -> Memory:
    """One rank of a reference or a reward model. Without a backward it holds one layer's activations at a time."""
    working = _layer_bytes(size, dtype, micro_batch_tokens) + (_logit_bytes(size, micro_batch_tokens) if logits else 0)
    return Memory(BYTES_OF[dtype] * size.num_params / shards, working, process=SCORER_PROCESS)


def engine_memory(size: ModelSize, *, dtype: Dtype, tensor_parallel_size: int, cache_bytes: float) -> Memory:
    """One rollout engine, or its part on one GPU if it is split over several.

    Verification of a publish needs a second copy of the weights.
    """
    state = BYTES_OF[dtype] * size.num_params / tensor_parallel_size
    return Memory(state, state, cache_bytes, ENGINE_PROCESS)


def _layer_bytes(size: ModelSize, dtype: Dtype, tokens: int) -> float:
    per_hidden, per_inner = _ALIVE_IN_BACKWARD
    return BYTES_OF[dtype] * tokens * (per_hidden * size.hidden + per_inner * size.feed_forward)


def _logit_bytes(size: ModelSize, tokens: int) -> float:
    return 4.0 * _LOGIT_COPIES * min(tokens, LOGIT_CHUNK) * size.vocabulary


@dataclass(frozen=True)
class NodeNeed:
    """Bytes that a plan needs on one node, and bytes that the node has (None: unknown)."""

    address: str
    kind: Literal["memory", "GPU memory"]
    certain: float
    needed: float
    available: float | None

    def describe(self) -> str:
        there = "unknown" if self.available is None else gib(self.available)
        return f"{self.address}: {self.kind} needed about {gib(self.needed)}, available {there}"


@dataclass(frozen=True)
class NodeOffer:
    """Memory of one node: host memory, and the sum over its GPUs. None: unknown."""

    memory: float | None
    gpu_memory: float | None = None


def needs(plan: Plan, memory_of: Mapping[str, Memory], offers: Mapping[str, NodeOffer]) -> list[NodeNeed]:
    """Sums a plan's processes per node. The coordinator, which may run on any node, is counted on the first.

    Args:
        memory_of: memory of one actor by role.
        offers: memory of nodes by address.
    """
    found: list[NodeNeed] = []
    for index, (address, offer) in enumerate(offers.items()):
        slots = [slot for slot in plan.slots if slot.address == address]
        extra = RAY_PROCESSES + (COORDINATOR_PROCESS if index == 0 else 0)
        on_cpu, on_gpu = _on(slots, memory_of, gpu=False), _on(slots, memory_of, gpu=True)
        found.append(
            NodeNeed(
                address,
                "memory",
                certain=extra + sum(m.state + m.process for m in on_cpu) + sum(m.process for m in on_gpu),
                needed=extra + sum(m.on_cpu for m in on_cpu) + sum(m.process for m in on_gpu),
                available=offer.memory,
            )
        )
        if on_gpu:
            certain, needed = sum(m.state for m in on_gpu), sum(m.on_device for m in on_gpu)
            found.append(NodeNeed(address, "GPU memory", certain, needed, offer.gpu_memory))
    return found


def _on(slots: Sequence[Slot], memory_of: Mapping[str, Memory], *, gpu: bool) -> list[Memory]:
    return [memory_of[slot.role] for slot in slots if (slot.gpu_share > 0) == gpu]


def too_much(found: Sequence[NodeNeed]) -> list[str]:
    """Warnings about nodes that probably have too little memory.

    Raises:
        CapacityError: weights, optimizer states and gradients alone exceed a node's memory.
    """
    way_out = (
        "Add nodes or memory, choose a smaller model, a higher zero_stage with more ranks, or fewer actors; "
        "gradient_checkpointing and a smaller micro_batch_tokens reduce the memory of a step."
    )
    known = [(need, need.available) for need in found if need.available is not None]
    short = [
        f"{need.address} has {gib(there)} of {need.kind}, and weights, optimizer states and gradients of the actors "
        f"placed there take {gib(need.certain)}"
        for need, there in known
        if need.certain > there
    ]
    if short:
        raise CapacityError(f"too little memory: {'; '.join(short)}. {way_out}")
    return [f"{need.describe()}. It may not fit. {way_out}" for need, there in known if need.needed > there]


def gib(number: float) -> str:
    return f"{number / GIB:.1f} GiB"
