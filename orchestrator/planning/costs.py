"""Estimates how long one role's work takes on given devices: pure functions of sizes and lengths, in seconds.

Compute follows Kaplan 2020 (arXiv 2001.08361, section 2.1): 2 FLOPs per parameter and token forward, twice that
backward, plus attention. Decoding follows the roofline of Pope 2022 (arXiv 2211.05102, section 3): a step takes the
time of reading weights and cache, or of its FLOPs, whichever is longer. Lengths are tokens, one entry per sample.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from orchestrator.config.base import Dtype
from orchestrator.planning.balance import RankPlan, micro_batches, share_prompt
from orchestrator.planning.hardware import Device
from orchestrator.planning.memory import BYTES_OF, ModelSize, Sharding, learner_states

Lengths = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Dimensions(ModelSize):
    """A model's size, and the sizes that decoding and heads need.

    Args:
        kv_width: key-value heads × their size.
        tied: whether the LM head is the embedding.
        bytes_per_weight: in engines and publishes; 2 for bf16, 4 for fp32.
    """

    kv_width: int
    tied: bool
    bytes_per_weight: int = 2

    @property
    def head(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def trunk(self) -> int:
        """Parameters in matrix products of each token, without the embedding and the head."""
        return self.num_params - self.head * (1 if self.tied else 2)

    @property
    def weight_bytes(self) -> float:
        return float(self.bytes_per_weight * self.num_params)

    @property
    def cache_bytes_per_token(self) -> float:
        return 2.0 * self.bytes_per_weight * self.num_layers * self.kv_width


def as_one(sizes: Sequence[Dimensions]) -> Dimensions:
    """One model that costs what these cost together, each of which reads all samples: the parameters and the width of
    all layers are those of all."""
    widest = max(sizes, key=lambda size: size.hidden)
    if len(sizes) == 1:
        return widest
    layers = math.ceil(sum(size.num_layers * size.hidden for size in sizes) / widest.hidden)
    return replace(widest, num_params=sum(size.num_params for size in sizes), num_layers=layers)


def forward_flops(size: Dimensions, lengths: Lengths, *, head_tokens: float) -> float:
    """Whole sequences of `lengths`, causal attention, the LM head on `head_tokens` positions."""
    tokens, squares = float(lengths.sum()), float((lengths**2).sum())
    attention = 2.0 * size.num_layers * size.hidden * squares  # 4 × layers × hidden × half of the square
    return 2.0 * size.trunk * tokens + attention + 2.0 * size.head * head_tokens


def line_lengths(prompts: Lengths, responses: Lengths, *, sharing: int, longest: int) -> Lengths:
    """Tokens of each line if `sharing` adjacent rows share a prompt that is computed once (actors.learning.sharing)."""
    return np.asarray(
        [
            prompts[start] + sum(responses[start + row] for row in line)
            for start in range(0, len(prompts), sharing)
            for line in share_prompt(int(prompts[start]), responses[start : start + sharing].tolist(), longest=longest)
        ],
        dtype=np.int64,
    )


@dataclass(frozen=True)
class LearnSettings:
    """Settings of learning or scoring; see the config keys of the same names.

    `adapters`: their parameters, which learn instead of the model's own; 0: there are none.
    """

    zero_stage: int = 1
    epochs: int = 1
    minibatches: int = 1
    micro_batch_tokens: int = 16384
    gradient_checkpointing: bool = False
    adapters: int = 0
    offload_optimizer: bool = False
    zero_hpz_partition_size: int = 1

    def sharding(self, dtype: Dtype, ranks: int) -> Sharding:
        return Sharding(dtype, self.zero_stage, ranks, self.offload_optimizer, self.zero_hpz_partition_size)

    def learned_share(self, size: Dimensions) -> float:
        """Share of the parameters that learn."""
        return self.adapters / size.num_params if self.adapters else 1.0


def score_seconds(
    size: Dimensions,
    device: Device,
    settings: LearnSettings,
    *,
    ranks: int,
    lengths: Lengths,
    head_tokens: float,
    evenly: bool = False,
) -> float:
    """One forward pass over a shard. With ZeRO-3, gathers of weights overlap with compute as far as possible.

    Args:
        evenly: the assignment of rows to ranks continues from shard to shard. Off: each shard starts at rank 0, which
            takes longest.
    """
    if evenly:
        flops = forward_flops(size, lengths, head_tokens=head_tokens) / ranks
        num_passes = float(lengths.sum()) / (ranks * settings.micro_batch_tokens)
    else:
        rows = lengths[::ranks]
        plan = micro_batches(range(len(rows)), rows.tolist(), settings.micro_batch_tokens)
        flops = forward_flops(size, _padded(plan, rows), head_tokens=head_tokens * len(rows) / len(lengths))
        num_passes = float(len(plan))
    gather = exchange_seconds(size.weight_bytes, device, ranks) if settings.zero_stage == 3 else 0.0
    return max(flops / (device.flops * device.efficiency.forward), num_passes * gather)


def learn_seconds(
    size: Dimensions, device: Device, settings: LearnSettings, *, ranks: int, lengths: Lengths, head_tokens: float
) -> float:
    """One step of learning, on the rank with the longest rows of each minibatch: micro-batches forward and backward,
    then the optimizer.

    Gathers of ZeRO-3 and compute overlap; the longer one counts.
    """
    gathers = _gather_seconds(size, device, settings, ranks)
    seconds = settings.minibatches * optimizer_seconds(size, device, settings, ranks=ranks)
    share = settings.learned_share(size)  # frozen weights have no gradient
    passes = (3 if settings.gradient_checkpointing else 2) + share
    touched = device.efficiency.micro_batch_bytes * (0.25 + 0.75 * share)  # a quarter reads the weights
    longest_first = np.sort(lengths)[::-1]
    for minibatch in range(settings.minibatches):
        rows = longest_first[minibatch :: settings.minibatches][::ranks]
        plan = micro_batches(range(len(rows)), rows.tolist(), settings.micro_batch_tokens)
        flops = passes * forward_flops(size, _padded(plan, rows), head_tokens=head_tokens * len(rows) / len(lengths))
        seconds += max(flops / (device.flops * device.efficiency.learn), len(plan) * gathers)
        seconds += len(plan) * _touch_seconds(size, device, touched)
        seconds += len(plan) * _offload_seconds(size, device, settings, ranks)
    return settings.epochs * seconds


def _gather_seconds(size: Dimensions, device: Device, settings: LearnSettings, ranks: int) -> float:
    """ZeRO-3's gathers of a micro-batch, forward and backward; the latter from the second copy, if there is one."""
    if settings.zero_stage != 3:
        return 0.0
    copies = settings.zero_hpz_partition_size
    backward = copies if copies > 1 else ranks
    return sum(exchange_seconds(size.weight_bytes, device, count) for count in (ranks, backward))


def _offload_seconds(size: Dimensions, device: Device, settings: LearnSettings, ranks: int) -> float:
    """Copying this rank's gradients of a micro-batch to an optimizer on the host."""
    if not settings.offload_optimizer:
        return 0.0
    return size.weight_bytes * settings.learned_share(size) / ranks / device.host_link


def optimizer_seconds(size: Dimensions, device: Device, settings: LearnSettings, *, ranks: int) -> float:
    """Reducing gradients, updating this rank's shard, gathering weights (ZeRO-3 gathers them in the forward). An update
    on the host is assumed to read and write its memory at the speed of the link to the device."""
    shards, share = ranks if settings.zero_stage else 1, settings.learned_share(size)
    update = _touch_seconds(size, device, device.efficiency.optimizer_bytes * share) / shards
    if settings.offload_optimizer:
        update = device.efficiency.optimizer_bytes * share * size.num_params / shards / device.host_link
    exchanges = 1 if settings.zero_stage == 3 else 2
    return update + exchanges * exchange_seconds(size.weight_bytes * share, device, ranks)


def exchange_seconds(num_bytes: float, device: Device, ranks: int) -> float:
    """A reduce-scatter or an all-gather of `num_bytes` over a ring of `ranks` devices."""
    return num_bytes * (ranks - 1) / ranks / (_slowest_link(device, ranks) * device.efficiency.links)


def generate_seconds(
    size: Dimensions, device: Device, *, width: int, prompt_tokens: Lengths, new_tokens: Lengths, cache_tokens: float
) -> float:
    """One shard on one engine of `width` devices: prefill, then decoding in one batch.

    Args:
        cache_tokens: capacity of the engine's KV cache. Samples beyond it wait.
    """
    prefill = forward_flops(size, prompt_tokens, head_tokens=float(len(prompt_tokens)))
    prefill /= width * device.flops * device.efficiency.forward
    longest = float((prompt_tokens + new_tokens).max())
    alive_T = alive_per_step(new_tokens, places=max(1, int(cache_tokens // longest)))
    if len(alive_T) == new_tokens.max():
        context_T = alive_T * (float(prompt_tokens.mean()) + np.arange(len(alive_T)))
    else:
        mean_age = float((new_tokens**2).sum()) / (2.0 * float(new_tokens.sum()))
        context_T = alive_T * (float(prompt_tokens.mean()) + mean_age)
    return prefill + float(decode_step_seconds(size, device, width=width, batch=alive_T, context=context_T).sum())


def decode_step_seconds(
    size: Dimensions,
    device: Device,
    *,
    width: int,
    batch: npt.NDArray[np.float64],
    context: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """Time of each decoding step on one engine.

    Args:
        batch: number of unfinished samples in each step.
        context: tokens in the cache in each step, all samples together.
    """
    efficiency = device.efficiency
    read = size.weight_bytes + size.cache_bytes_per_token * context
    flops = 2.0 * (size.trunk + size.head) * batch + 4.0 * size.num_layers * size.hidden * context
    exchanged = (
        4.0 * size.num_layers * batch * size.bytes_per_weight * size.hidden * (width - 1) / width
    )  # two all-reduces per layer
    at_work = np.maximum(
        read / (width * device.bandwidth * efficiency.memory), flops / (width * device.flops * efficiency.decode)
    )
    return np.asarray(
        efficiency.decode_step_s + at_work + exchanged / (_slowest_link(device, width) * efficiency.links)
    )


def alive_per_step(new_tokens: Lengths, *, places: int) -> npt.NDArray[np.float64]:
    """Number of samples decoded in each step. Samples beyond `places` start, in order, when others end."""
    ends = new_tokens
    if places < len(new_tokens):
        last = [0] * places
        for length in new_tokens.tolist():
            heapq.heapreplace(last, last[0] + length)
        ends = np.asarray(last)
    steps = np.arange(int(ends.max()))
    return (len(ends) - np.searchsorted(np.sort(ends), steps, side="right")).astype(np.float64)


def publish_seconds(size: Dimensions, device: Device, *, devices: int) -> float:
    """Broadcasting weights to all engines, then reading them once for verification."""
    carried = size.weight_bytes / (_slowest_link(device, devices) * device.efficiency.links)
    return carried + size.weight_bytes / (device.bandwidth * device.efficiency.memory)


def wake_seconds(size: Dimensions, device: Device, *, width: int) -> float:
    """Copying an engine's weights from host memory to its devices, or back."""
    return size.weight_bytes / width / device.host_link


def rest_seconds(size: Dimensions, device: Device, settings: LearnSettings, *, ranks: int) -> float:
    """Copying a learner's gradients, master weights and optimizer states to host memory, or back; what is offloaded
    stays there."""
    dtype: Dtype = "bfloat16" if size.bytes_per_weight == BYTES_OF["bfloat16"] else "float32"
    learned = settings.learned_share(size) * size.num_params
    return learner_states(learned, settings.sharding(dtype, ranks)).states / device.host_link


def _padded(plan: RankPlan, lengths: Lengths) -> Lengths:
    """Lengths including padding: all rows of a micro-batch have the length of its longest row."""
    return np.asarray([lengths[micro[0]] for micro in plan for _ in micro], dtype=np.int64)


def _touch_seconds(size: Dimensions, device: Device, num_bytes: float) -> float:
    """Time for a number of bytes of memory traffic per parameter."""
    return num_bytes * size.num_params / (device.bandwidth * device.efficiency.memory)


def _slowest_link(device: Device, devices: int) -> float:
    return device.link if devices <= device.per_node else device.network
