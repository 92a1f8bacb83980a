"""Costs against hand-worked rows, on a device with round numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from orchestrator.errors import ConfigError
from orchestrator.planning.costs import (
    Dimensions,
    LearnSettings,
    alive_per_step,
    decode_step_seconds,
    exchange_seconds,
    forward_flops,
    generate_seconds,
    learn_seconds,
    line_lengths,
    publish_seconds,
    rest_seconds,
    score_seconds,
)
from orchestrator.planning.hardware import DEVICES, Device, Efficiency, device_of

HALF = Efficiency(learn=0.5, forward=0.5, decode=0.5, memory=0.5, links=0.5, decode_step_s=0.25)
DEVICE = Device("round", 1000.0, 100.0, 1e9, link=80.0, network=8.0, host_link=10.0, efficiency=HALF, per_node=4)
# Head 10 × 4 = 40, trunk 200 - 40 = 160, weights 400 bytes, cache 2 × 2 bytes × 2 layers × 2 = 16 bytes per token.
SIZE = Dimensions(200, 2, 4, 8, 10, kv_width=2, tied=True)
LENGTHS = np.asarray([3, 5])
# 2 × 160 × 8 tokens + 2 × 2 layers × 4 hidden × (9 + 25) + 2 × 40 × 4 head tokens
FORWARD = 2560 + 544 + 320
# Both rows padded to 5.
PADDED = 3200 + 800 + 320


def test_a_forward_pass_by_hand() -> None:
    assert forward_flops(SIZE, LENGTHS, head_tokens=4.0) == FORWARD


def test_an_embedding_of_its_own_is_no_work() -> None:
    assert replace(SIZE, tied=False).trunk == 120


def test_bytes_of_a_decoding_step_by_hand() -> None:
    fast = replace(DEVICE, flops=1e9)
    (seconds,) = decode_step_seconds(SIZE, fast, width=1, batch=np.asarray([3.0]), context=np.asarray([30.0]))
    assert seconds == pytest.approx(0.25 + (400 + 30 * 16) / (100 * 0.5))


def test_a_large_batch_is_bound_by_flops() -> None:
    wide = replace(DEVICE, bandwidth=1e9)
    (seconds,) = decode_step_seconds(SIZE, wide, width=1, batch=np.asarray([3.0]), context=np.asarray([30.0]))
    assert seconds == pytest.approx(0.25 + (2 * 200 * 3 + 4 * 2 * 4 * 30) / (1000 * 0.5))


def test_an_engine_of_two_pays_for_its_all_reduces() -> None:
    (seconds,) = decode_step_seconds(SIZE, DEVICE, width=2, batch=np.asarray([3.0]), context=np.asarray([30.0]))
    reduced = 4 * 2 * 3 * 2 * 4 / 2
    assert seconds == pytest.approx(0.25 + (400 + 480) / (2 * 50) + reduced / (80 * 0.5))


def test_a_learning_step_by_hand() -> None:
    seconds = learn_seconds(
        SIZE, DEVICE, LearnSettings(micro_batch_tokens=10), ranks=1, lengths=LENGTHS, head_tokens=4.0
    )
    added, updated = 16 * 200 / 50, 30 * 200 / 50
    assert seconds == pytest.approx(3 * PADDED / 500 + added + updated)


def test_checkpointing_runs_one_more_forward() -> None:
    plain, again = (
        learn_seconds(
            SIZE,
            DEVICE,
            LearnSettings(micro_batch_tokens=10, gradient_checkpointing=checkpointing),
            ranks=1,
            lengths=LENGTHS,
            head_tokens=4.0,
        )
        for checkpointing in (False, True)
    )
    assert again - plain == pytest.approx(PADDED / 500)


def test_smaller_micro_batches_touch_the_gradients_more_often() -> None:
    one, two = (
        learn_seconds(SIZE, DEVICE, LearnSettings(micro_batch_tokens=tokens), ranks=1, lengths=LENGTHS, head_tokens=0.0)
        for tokens in (10, 5)
    )
    padding = 2 * 160 * 2 + 2 * 2 * 4 * (25 - 9)
    assert two - one == pytest.approx(16 * 200 / 50 - 3 * padding / 500)


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_more_ranks_of_one_node_never_learn_slower(zero_stage: int) -> None:
    near = replace(DEVICE, link=1e12, per_node=64)
    lengths = np.full(64, 5)
    seconds = [
        learn_seconds(SIZE, near, LearnSettings(zero_stage), ranks=ranks, lengths=lengths, head_tokens=64.0)
        for ranks in (1, 2, 4, 8, 16, 32, 64)
    ]
    assert seconds == sorted(seconds, reverse=True)


def test_scoring_gains_nothing_from_ranks_beyond_the_rows_of_a_shard() -> None:
    two, eight = (
        score_seconds(SIZE, DEVICE, LearnSettings(0), ranks=ranks, lengths=LENGTHS, head_tokens=4.0) for ranks in (2, 8)
    )
    assert two == eight


def test_scoring_dealt_on_evenly_is_flops_over_ranks() -> None:
    seconds = score_seconds(SIZE, DEVICE, LearnSettings(0), ranks=8, lengths=LENGTHS, head_tokens=4.0, evenly=True)
    assert seconds == pytest.approx(FORWARD / (8 * 500))


def test_an_exchange_goes_over_the_slowest_link() -> None:
    assert exchange_seconds(400.0, DEVICE, 1) == 0.0
    assert exchange_seconds(400.0, DEVICE, 4) == pytest.approx(400 * 3 / 4 / (80 * 0.5))
    assert exchange_seconds(400.0, DEVICE, 8) == pytest.approx(400 * 7 / 8 / (8 * 0.5))


def test_a_publish_carries_the_weights_and_reads_them_once() -> None:
    assert publish_seconds(SIZE, DEVICE, devices=4) == pytest.approx(400 / 40 + 400 / 50)


def test_samples_alive_in_each_step() -> None:
    assert alive_per_step(np.asarray([1, 3, 2]), places=3).tolist() == [3, 2, 1]
    assert alive_per_step(np.asarray([1, 3, 2]), places=2).tolist() == [2, 2, 2]
    assert alive_per_step(np.asarray([1, 3, 2]), places=1).tolist() == [1] * 6


def test_a_small_cache_makes_samples_wait() -> None:
    prompts, responses = np.full(8, 4), np.full(8, 16)
    roomy, cramped = (
        generate_seconds(SIZE, DEVICE, width=1, prompt_tokens=prompts, new_tokens=responses, cache_tokens=tokens)
        for tokens in (160.0, 40.0)
    )
    assert cramped > 1.5 * roomy


def test_an_unknown_gpu_is_refused_with_the_known_ones() -> None:
    assert device_of("H100") is DEVICES["h100"]
    with pytest.raises(ConfigError, match="choose one of h100"):
        device_of("abacus")


def test_a_prompt_that_is_shared_counts_once_a_line() -> None:
    prompts, responses = np.asarray([10, 10, 10, 20, 20, 20]), np.asarray([1, 2, 3, 4, 5, 6])
    assert line_lengths(prompts, responses, sharing=3, longest=100).tolist() == [10 + 6, 20 + 15]
    # 35 tokens exceed a line: the first response is alone, the other two share.
    assert line_lengths(prompts[3:], responses[3:], sharing=3, longest=31).tolist() == [24, 31]


def test_a_minibatch_costs_what_its_own_rows_cost() -> None:
    settings = LearnSettings(minibatches=2, micro_batch_tokens=1000)
    apart = [
        learn_seconds(SIZE, DEVICE, replace(settings, minibatches=1), ranks=1, lengths=rows, head_tokens=0.0)
        for rows in (np.asarray([9, 5]), np.asarray([7, 3]))
    ]
    together = learn_seconds(SIZE, DEVICE, settings, ranks=1, lengths=np.asarray([3, 5, 7, 9]), head_tokens=0.0)
    assert together == pytest.approx(sum(apart))


def test_frozen_weights_cost_no_gradients() -> None:
    adapted = LearnSettings(micro_batch_tokens=10, adapters=20)  # a tenth of the parameters
    seconds = learn_seconds(SIZE, DEVICE, adapted, ranks=1, lengths=LENGTHS, head_tokens=4.0)
    added, updated = 16 * (0.25 + 0.075) * 200 / 50, 30 * 0.1 * 200 / 50
    assert seconds == pytest.approx(2.1 * PADDED / 500 + added + updated)


def test_an_optimizer_on_the_host_costs_the_link() -> None:
    """Weights of 400 bytes on 2 ranks, over a link of 10 bytes/s. 30 bytes per parameter of an update cross it, and the
    gradients of every micro-batch."""
    settings = LearnSettings(zero_stage=3, micro_batch_tokens=10)
    on_device, on_host = (
        learn_seconds(SIZE, DEVICE, each, ranks=2, lengths=LENGTHS, head_tokens=4.0)
        for each in (settings, replace(settings, offload_optimizer=True))
    )
    update = 30 * 200 / 2
    assert on_host - on_device == pytest.approx(update / 10 - update / 50 + 400 / 2 / 10)
    resting = [
        rest_seconds(SIZE, DEVICE, each, ranks=2) for each in (settings, replace(settings, offload_optimizer=True))
    ]
    assert resting == pytest.approx([18 * 200 / 2 / 10, 2 * 200 / 2 / 10])


def test_a_second_copy_of_the_weights_saves_the_network_in_the_backward() -> None:
    bound = replace(DEVICE, flops=1e12, bandwidth=1e12)  # only gathers take time
    plain = LearnSettings(zero_stage=3, micro_batch_tokens=10)
    one, two = (
        learn_seconds(SIZE, bound, each, ranks=8, lengths=np.asarray([5]), head_tokens=0.0)
        for each in (plain, replace(plain, zero_hpz_partition_size=4))
    )
    near, far = 400 * 3 / 4 / (80 * 0.5), 400 * 7 / 8 / (8 * 0.5)
    assert one - two == pytest.approx(far - near, rel=1e-6)
