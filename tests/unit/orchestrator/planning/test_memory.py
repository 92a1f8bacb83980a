"""The memory estimate: hand-worked bytes per parameter, sums per node, and messages if it does not fit."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from orchestrator.config.sections import LoraConfig
from orchestrator.errors import CapacityError
from orchestrator.planning import memory, peaks
from orchestrator.planning.memory import (
    GIB,
    Memory,
    ModelSize,
    Sharding,
    engine_memory,
    gpu_engine_memory,
    in_one_process,
    learner_memory,
    learner_states,
    scorer_memory,
    with_on_trunk,
)
from orchestrator.planning.needs import NodeNeed, NodeOffer, needs, too_much
from orchestrator.planning.peaks import Peak
from orchestrator.planning.placement import Demand, Node, place

SIZE = ModelSize(num_params=1000, num_layers=3, hidden=8, feed_forward=16, vocabulary=100)
SMOLLM2 = ModelSize(num_params=134_515_008, num_layers=30, hidden=576, feed_forward=1536, vocabulary=49_152)


def learner(size: ModelSize = SIZE, **changes: Any) -> Memory:
    settings: dict[str, Any] = {
        "dtype": "bfloat16", "zero_stage": 1, "ranks": 1, "micro_batch_tokens": 10, "gradient_checkpointing": False,
        "logits": True, "offload_optimizer": False, "zero_hpz_partition_size": 1, **changes,
    }  # fmt: skip
    sharding = Sharding(**{field.name: settings.pop(field.name) for field in fields(Sharding)})
    return learner_memory(size, sharding, **settings)


@pytest.mark.parametrize(
    ("dtype", "zero_stage", "ranks", "bytes_per_param"),
    [
        ("bfloat16", 0, 1, 2 + 2 + 4 + 8),  # weights, gradients, masters, moments
        ("bfloat16", 1, 1, 2 + 2 + 4 + 4 + 8),  # plus fp32 accumulation
        ("bfloat16", 1, 4, 2 + 2 + 4 + (4 + 8) / 4),
        ("bfloat16", 2, 4, 2 + (2 + 4 + 4 + 8) / 4),
        ("bfloat16", 3, 4, (2 + 2 + 4 + 4 + 8) / 4),
        ("float32", 0, 1, 4 + 4 + 8),
        ("float32", 1, 1, 4 + 4 + 8),
        ("float32", 1, 2, 4 + 4 + (4 + 8) / 2),
        ("float32", 3, 2, (4 + 4 + 4 + 8) / 2),
    ],
)
def test_what_zero_shards(dtype: str, zero_stage: int, ranks: int, bytes_per_param: float) -> None:
    assert learner(dtype=dtype, zero_stage=zero_stage, ranks=ranks).state == pytest.approx(1000 * bytes_per_param)


def test_activations_grow_with_tokens_and_shrink_with_checkpointing() -> None:
    temporaries = 8 * 1000
    per_layer = 2 * 10 * (10 * 8 + 4 * 16)
    assert learner(logits=False).working == temporaries + 3 * per_layer
    kept = 3 * 8 * 10 * 2  # the input of each layer
    assert learner(logits=False, gradient_checkpointing=True).working == temporaries + per_layer + kept


def test_only_one_chunk_of_logits_lives_at_a_time() -> None:
    few, many = (
        learner(micro_batch_tokens=count).working - learner(micro_batch_tokens=count, logits=False).working
        for count in (512, 5120)
    )
    assert few == many == 4 * 4 * 512 * 100 + 4 * 100 * 8


def test_a_publish_needs_two_buckets_and_what_is_gathered_or_joined_besides() -> None:
    largest = 2 * 100 * 8
    assert [learner(zero_stage=stage, ranks=2).sending for stage in (1, 2, 3)] == [
        2 * largest,
        2 * largest,
        4 * largest,
    ]
    assert learner(zero_stage=3, ranks=2, logits=False).sending == 0, "critics do not publish"
    engine = gpu_engine_memory(SIZE, dtype="bfloat16", tensor_parallel_size=2, sequences=1)
    assert engine.sending == 3 * largest


def test_a_scorer_holds_weights_alone_and_an_engine_its_cache_besides() -> None:
    assert scorer_memory(SIZE, dtype="bfloat16", shards=2, micro_batch_tokens=1, logits=False).state == 1000
    engine = engine_memory(SIZE, dtype="float32", tensor_parallel_size=2, cache_bytes=77)
    assert (engine.state, engine.cache, engine.on_device) == (2000, 77, 4077)


def test_the_estimate_brackets_what_real_actors_held() -> None:
    """SmolLM2-135M in bf16 on CPUs, 1,024 tokens per micro-batch, ZeRO 1, one rank; resident MiB between steps."""
    measured = {"policy": 3850, "critic": 3528, "reference": 835, "reward": 831, "rollout": 2059}
    estimated = {
        "policy": learner(SMOLLM2, micro_batch_tokens=1024),
        "critic": learner(SMOLLM2, micro_batch_tokens=1024, logits=False),
        "reference": scorer_memory(SMOLLM2, dtype="bfloat16", shards=1, micro_batch_tokens=4096, logits=True),
        "reward": scorer_memory(SMOLLM2, dtype="bfloat16", shards=1, micro_batch_tokens=4096, logits=False),
        "rollout": engine_memory(SMOLLM2, dtype="bfloat16", tensor_parallel_size=1, cache_bytes=0.5 * GIB),
    }
    for role, size_mib in measured.items():
        held, guess = size_mib * memory.MIB, estimated[role]
        assert guess.state + guess.process <= held, role
        assert guess.state + guess.process + guess.cache >= 0.75 * held, role
        assert guess.on_cpu >= 0.85 * held, role


def test_processes_are_summed_where_they_are_placed() -> None:
    demands = [Demand("policy", 1, 1.0, 1.0), Demand("reward", 2, 1.0)]
    plan = place(demands, [Node("gpu", 1.0, 1.0), Node("cpu", 2.0)], mode="separate")
    memory_of = {"policy": Memory(state=100, working=10, process=5), "reward": Memory(state=20, working=10, process=1)}
    found = needs(plan, memory_of, {"gpu": NodeOffer(1e12, 1e12), "cpu": NodeOffer(None)})
    host, device, other = found
    fixed = memory.RAY_PROCESSES + memory.COORDINATOR_PROCESS
    assert (host.kind, host.needed, host.certain) == ("memory", fixed + 5, fixed + 5)
    assert (device.kind, device.needed) == ("GPU memory", pytest.approx(peaks.CONTEXT + 110 * 1.05))
    assert other.needed == pytest.approx(memory.RAY_PROCESSES + 2 * (30 + 1))
    assert "available unknown" in other.describe()
    assert too_much(found) == []


def test_what_certainly_does_not_fit_is_an_error_and_what_may_not_a_warning() -> None:
    start = Peak("start", {"policy": 5 * GIB})
    tight = NodeNeed("a", "memory", certain=3 * GIB, needed=5 * GIB, available=4 * GIB, peak=start)
    (warning,) = too_much([tight])
    assert "a: memory needed about 5.0 GiB, in phase start 5.0 GiB (policy 5.0), available 4.0 GiB" in warning
    assert "zero_stage" in warning
    short = NodeNeed("b", "memory", certain=9 * GIB, needed=9 * GIB, available=8 * GIB, peak=start)
    with pytest.raises(CapacityError, match=r"b has 8.0 GiB of memory, .* take 9.0 GiB.*smaller model"):
        too_much([tight, short])


def test_frozen_weights_have_neither_gradients_nor_optimizer_states() -> None:
    full = learner(dtype="float32", zero_stage=0).state
    adapted = learner(dtype="float32", zero_stage=0, adapters=50)
    assert (full, adapted.state) == (1000 * 16, 1000 * 4 + 50 * 16)
    plain = learner(dtype="float32", zero_stage=0)
    assert plain.working - adapted.working == 8 * (1000 - 50) + 4 * 100 * 8  # of Adam, and of the head's gradient


def test_a_critic_on_the_trunk_adds_its_adapters_and_their_states_to_the_policy() -> None:
    policy = learner(zero_stage=1, ranks=2, adapters=50)
    both = with_on_trunk(policy, 30, Sharding("bfloat16", 1, 2))
    assert both.weights - policy.weights == 30 * 2
    assert both.resting - policy.resting == 30 * (2 + 4 + (4 + 8) / 2)
    assert both.moments - policy.moments == 30 * 8 / 2
    assert (both.process, both.working, both.scoring) == (policy.process, policy.working, policy.scoring)


def test_an_offloaded_optimizer_is_on_the_host() -> None:
    """7.6 billion parameters on 8 GPUs."""
    sharding = Sharding("bfloat16", 3, 8)
    plain = learner_states(7.6e9, sharding)
    assert (plain.weights, plain.states) == pytest.approx((2 * 7.6e9 / 8, 18 * 7.6e9 / 8))
    assert (plain.moments, plain.offloaded) == (8 * 7.6e9 / 8, 0)
    offloaded = learner_states(7.6e9, replace(sharding, offload_optimizer=True))
    assert (offloaded.weights, offloaded.states, offloaded.moments) == (plain.weights, 2 * 7.6e9 / 8, 0)
    assert offloaded.offloaded == 16 * 7.6e9 / 8
    on_device, plain_device = (learner(zero_stage=3, ranks=8, offload_optimizer=each) for each in (True, False))
    assert plain_device.state - on_device.state == on_device.offloaded == 16 * 1000 / 8
    assert plain_device.working - on_device.working == 8 * 1000 / 8, "Adam's temporaries are on the host"
    assert learner_states(100, Sharding("float32", 1, 1, offload_optimizer=True)).offloaded == 100 * 12


def test_a_second_copy_of_the_weights_is_counted() -> None:
    assert learner_states(1000, Sharding("bfloat16", 3, 16, zero_hpz_partition_size=8)).weights == pytest.approx(
        2 * 1000 * (1 / 16 + 1 / 8)
    )


def test_the_host_holds_what_is_offloaded_besides_what_rests() -> None:
    plan = place([Demand("policy", 1, 1.0, 1.0)], [Node("a", 4.0, 1.0)], mode="separate")
    host, _ = needs(plan, {"policy": Memory(state=5.0, process=3.0, offloaded=7.0)}, {"a": NodeOffer(1e12, 1e12)})
    fixed = memory.RAY_PROCESSES + memory.COORDINATOR_PROCESS
    assert host.certain == host.needed == fixed + 3 + 7


def test_a_quantised_trunk_holds_its_linear_layers_in_few_bits() -> None:
    size = replace(SIZE, linear=(("q_proj", 3, 8, 6), ("down_proj", 3, 16, 8)))  # 528 of 1000 parameters
    assert size.frozen_bytes(4) == 4000
    assert replace(size, trunk_bits=4).frozen_bytes(4) == 472 * 4 + 528 * (0.5 + 4 / 64)
    assert replace(size, trunk_bits=8).frozen_bytes(2) == 472 * 2 + 528 * (1 + 4 / 256)
    plain, few = (
        learner(each, dtype="float32", zero_stage=0, adapters=50) for each in (size, replace(size, trunk_bits=4))
    )
    assert plain.state - few.state == 528 * (4 - 0.5 - 4 / 64)
    assert few.working - plain.working == 4 * 16 * 8, "one layer at a time is dequantised"


def test_models_of_one_process_compute_in_turn() -> None:
    models = [Memory(100.0, 7.0, 0.0, 50.0), Memory(20.0, 9.0, 0.0, 50.0)]
    assert in_one_process(models) == Memory(120.0, 9.0, 0.0, 50.0)


def test_adapters_are_counted() -> None:
    size = replace(SIZE, linear=(("q_proj", 3, 8, 6), ("down_proj", 3, 16, 8)))
    assert size.adapter_params(LoraConfig(rank=2)) == 3 * 2 * (8 + 6) + 3 * 2 * (16 + 8)
    assert size.adapter_params(LoraConfig(rank=2, targets=("q_proj",))) == 84
    assert size.adapter_params(LoraConfig(rank=2, targets=("q_proj",), dora=True)) == 84 + 3 * 6
