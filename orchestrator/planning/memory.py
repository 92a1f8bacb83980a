"""Estimates the memory that a placement plan needs from sizes, before any model is loaded.

`state` follows from the settings: if it does not fit, the run can't start. Together with process overhead it was within
a fifth of the measured memory of learners on CPUs between steps. `working` (activations of one micro-batch, logits of
one chunk, temporaries of the optimizer) is needed in addition while a role computes; it was not measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from orchestrator.config.base import Dtype
from orchestrator.config.sections import LoraConfig, TrainingConfig

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

ENGINE_BATCH_TOKENS = 16384  # of one engine step on a large GPU: vLLM's default for LLM
_SAMPLER_COPIES = 3  # logits in fp32, their log-softmax, and sorted for top-p
ZERO_BUCKET = 50_000_000  # gradients on their way, two at a time; as learners set it
ZERO3_LIVE = 1_000_000_000  # gathered parameters; DeepSpeed's default

BYTES_OF: Mapping[Dtype, int] = {"bfloat16": 2, "float32": 4}
_MOMENTS, _MASTERS, _SUMS = 8, 4, 4  # bytes per parameter in fp32: Adam's two moments, master weights, gradients' sums
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
        stored: type of the weights on disk. None: unknown.
    """

    num_params: int
    num_layers: int
    hidden: int
    feed_forward: int
    vocabulary: int
    linear: tuple[tuple[str, int, int, int], ...] = field(default=(), kw_only=True)
    trunk_bits: int | None = field(default=None, kw_only=True)
    stored: str | None = field(default=None, kw_only=True)

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
    """Bytes of one process. `process` is on the host; the rest is on the device, if there is one.

    Args:
        working: in addition to `state`, while a learner learns, a scorer scores or an engine samples.
        resting: the part of `state` that a learner moves to the host while other roles use its GPU.
        moments: the part of `resting` that the first update creates.
        scoring: in addition to `state`, while a learner scores.
        sending: in addition to `state`, during a publish.
        offloaded: of a learner whose optimizer is on the host: what the host always holds.
        loading: all weights, which are on the device until ZeRO-3 has divided them. 0: `state` has them.
        converting: all weights, if they are converted on the host before they go to a device.
    """

    state: float = 0.0
    working: float = 0.0
    cache: float = 0.0
    process: float = 0.0
    resting: float = 0.0
    moments: float = 0.0
    scoring: float = 0.0
    sending: float = 0.0
    offloaded: float = 0.0
    loading: float = 0.0
    converting: float = 0.0

    @property
    def starting(self) -> float:
        """On the device at most while a role starts; no update has created the optimizer's moments."""
        return max(self.state - self.moments, self.loading)

    @property
    def weights(self) -> float:
        return self.state - self.resting

    @property
    def held(self) -> float:
        """Between calls, on the device and on the host."""
        return self.state + self.offloaded

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
        state=sum(model.state for model in models),
        working=max(model.working for model in models),
        cache=sum(model.cache for model in models),
        process=max(model.process for model in models),
        scoring=max(model.scoring for model in models),
        converting=max(model.converting for model in models),
    )


def effective_zero_stage(zero_stage: int, *, dtype: Dtype, ranks: int, offloads: bool = False) -> int:
    """The stage that a learner uses: 0 instead of 1 and 2 on a single rank in fp32, which has nothing to shard and no
    master weights. These stages would only copy gradients and weights. Stage 0 can't have its optimizer on the host."""
    return 0 if ranks == 1 and dtype == "float32" and zero_stage < 3 and not offloads else zero_stage


@dataclass(frozen=True)
class Sharding:
    """How a learner's bytes are divided over its ranks, and between device and host; keys of the config."""

    dtype: Dtype
    zero_stage: int
    ranks: int
    offload_optimizer: bool = False
    zero_hpz_partition_size: int = 1

    @classmethod
    def of(cls, section: TrainingConfig, dtype: Dtype) -> Sharding:
        keys = ("zero_stage", "ranks", "offload_optimizer", "zero_hpz_partition_size")
        return cls(dtype, **{key: getattr(section, key) for key in keys})

    @property
    def stage(self) -> int:
        """The ZeRO stage that is used."""
        return effective_zero_stage(
            self.zero_stage, dtype=self.dtype, ranks=self.ranks, offloads=self.offload_optimizer
        )


@dataclass(frozen=True)
class LearnerStates:
    """Bytes of one rank of a learner between its micro-batches.

    Args:
        weights: what a forward reads; with zero_hpz_partition_size the second copy, too.
        states: what only an update needs and the device holds: gradients, and moments and master weights unless they
            are offloaded.
        moments: the part of `states` that the first update creates.
        offloaded: what the host always holds.
    """

    weights: float
    states: float
    moments: float
    offloaded: float


def learner_states(learned: float, sharding: Sharding, *, frozen_bytes: float = 0.0) -> LearnerStates:
    """A policy or a critic under ZeRO (Rajbhandari 2020, section 3). Stage 1 shards moments and master weights, stage 2
    also gradients, stage 3 also weights.

    Args:
        learned: number of parameters that learn.
        frozen_bytes: of all weights that do not.
    """
    held, stage, is_mixed = BYTES_OF[sharding.dtype], sharding.stage, sharding.dtype == "bfloat16"
    whole = held * learned + frozen_bytes
    weights = whole / (sharding.ranks if stage == 3 else 1)
    if stage == 3 and sharding.zero_hpz_partition_size > 1:
        weights += whole / sharding.zero_hpz_partition_size
    with_gradient = learned / (sharding.ranks if stage >= 2 else 1)
    updated = learned / (sharding.ranks if stage else 1)
    gradients, sums = held * with_gradient, (_SUMS if is_mixed and stage else 0) * with_gradient
    masters, moments = (_MASTERS if is_mixed or stage else 0) * updated, _MOMENTS * updated
    if sharding.offload_optimizer:
        return LearnerStates(weights, gradients, 0.0, sums + masters + moments)
    return LearnerStates(weights, gradients + sums + masters + moments, moments, 0.0)


def learner_memory(
    size: ModelSize,
    sharding: Sharding,
    *,
    micro_batch_tokens: int,
    gradient_checkpointing: bool,
    logits: bool,
    adapters: int = 0,
) -> Memory:
    """One rank of a policy or a critic (`logits` off).

    Args:
        adapters: parameters of adapters, which then learn instead of the model's own; 0: there are none.
    """
    dtype, held, stage = sharding.dtype, BYTES_OF[sharding.dtype], sharding.stage
    learned = adapters or size.num_params
    frozen = size.frozen_bytes(held) if adapters else 0.0
    found = learner_states(learned, sharding, frozen_bytes=frozen)
    updated_here = 0.0 if sharding.offload_optimizer else learned / (sharding.ranks if stage else 1)
    layers = 1 if gradient_checkpointing else size.num_layers
    working = (
        _ADAM_TEMPORARIES * updated_here
        + layers * _layer_bytes(size, dtype, micro_batch_tokens)
        + (size.num_layers * size.hidden * micro_batch_tokens * held if gradient_checkpointing else 0)
        + (held * max(i * o for _, _, i, o in size.linear) if size.trunk_bits else 0)  # one layer, dequantised
        + (_logit_bytes(size, micro_batch_tokens) if logits else 0)
        + (4 * size.vocabulary * size.hidden if logits and not adapters else 0)
    )
    buffers = _zero_buffers(size, held, stage, sharding.ranks)
    return Memory(
        found.weights + found.states,
        working + buffers,
        process=LEARNER_PROCESS,
        resting=found.states,
        moments=found.moments,
        scoring=_forward_bytes(size, dtype, micro_batch_tokens, logits=logits) + (buffers if stage == 3 else 0),
        sending=_sent_bytes(size, held, tensors=2 if stage == 3 else 0) if logits else 0.0,
        offloaded=found.offloaded,
        loading=held * learned + frozen,
        converting=_converting(size, dtype),
    )


def with_on_trunk(policy: Memory, adapters: int, sharding: Sharding) -> Memory:
    """A rank of the policy with a critic on its trunk, which has so many parameters of its own. A reference on the
    trunk adds nothing."""
    more = learner_states(adapters, sharding)
    return replace(
        policy,
        state=policy.state + more.weights + more.states,
        resting=policy.resting + more.states,
        moments=policy.moments + more.moments,
        offloaded=policy.offloaded + more.offloaded,
    )


def scorer_memory(size: ModelSize, *, dtype: Dtype, shards: int, micro_batch_tokens: int, logits: bool) -> Memory:
    """One rank of a reference or a reward model. Without a backward it holds one layer's activations at a time."""
    working = _forward_bytes(size, dtype, micro_batch_tokens, logits=logits)
    if shards > 1:
        working += _zero_buffers(size, BYTES_OF[dtype], 3, shards)
    whole = float(BYTES_OF[dtype] * size.num_params)
    return Memory(
        whole / shards,
        working,
        process=SCORER_PROCESS,
        scoring=working,
        loading=whole,
        converting=_converting(size, dtype),
    )


def engine_memory(size: ModelSize, *, dtype: Dtype, tensor_parallel_size: int, cache_bytes: float) -> Memory:
    """One rollout engine on a CPU. Verification of a publish needs a second copy of the weights."""
    state = BYTES_OF[dtype] * size.num_params / tensor_parallel_size
    return Memory(state, state, cache_bytes, ENGINE_PROCESS)


def gpu_engine_memory(size: ModelSize, *, dtype: Dtype, tensor_parallel_size: int, sequences: int) -> Memory:
    """The part of one rollout engine on one GPU, without its cache.

    Args:
        sequences: samples that it generates at a time, whose logits the sampler holds.
    """
    held = BYTES_OF[dtype]
    activations = _layer_bytes(size, dtype, ENGINE_BATCH_TOKENS)
    logits = _SAMPLER_COPIES * 4 * sequences * size.vocabulary
    return Memory(
        held * size.num_params / tensor_parallel_size,
        (activations + logits) / tensor_parallel_size,
        process=ENGINE_PROCESS,
        sending=_sent_bytes(size, held, tensors=1),
    )


def _converting(size: ModelSize, dtype: Dtype) -> float:
    """Files of the same type are mapped."""
    return 0.0 if size.stored == dtype else float(BYTES_OF[dtype] * size.num_params)


def _forward_bytes(size: ModelSize, dtype: Dtype, tokens: int, *, logits: bool) -> float:
    """A forward pass without a backward: one layer's activations at a time."""
    return _layer_bytes(size, dtype, tokens) + (_logit_bytes(size, tokens) if logits else 0)


def _zero_buffers(size: ModelSize, held: int, zero_stage: int, ranks: int) -> float:
    """DeepSpeed's buffers between ranks: gradients on their way, and with ZeRO-3 gathered weights."""
    if ranks == 1 or not zero_stage:
        return 0.0
    gathered = min(size.num_params, ZERO3_LIVE) if zero_stage == 3 else 0
    return float(held * (2 * min(size.num_params, ZERO_BUCKET) + gathered))


def _sent_bytes(size: ModelSize, held: int, *, tensors: int) -> float:
    """Two buckets, one on its way while the other is filled or applied, each as large as the largest tensor.

    Args:
        tensors: held besides: with ZeRO-3 the gathered one and its copy, in an engine the one that two buckets bring.
    """
    return float((2 + tensors) * held * size.vocabulary * size.hidden)


def _layer_bytes(size: ModelSize, dtype: Dtype, tokens: int) -> float:
    per_hidden, per_inner = _ALIVE_IN_BACKWARD
    return BYTES_OF[dtype] * tokens * (per_hidden * size.hidden + per_inner * size.feed_forward)


def _logit_bytes(size: ModelSize, tokens: int) -> float:
    return 4.0 * _LOGIT_COPIES * min(tokens, LOGIT_CHUNK) * size.vocabulary


def gib(number: float) -> str:
    return f"{number / GIB:.1f} GiB"
