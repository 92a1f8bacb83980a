"""Standardised sources of a weighted reward, by hand."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest

from orchestrator import schema
from orchestrator.algorithms.experience import ExperienceSettings, assemble, summarise
from orchestrator.algorithms.ppo import Ppo
from orchestrator.algorithms.standardising import WeightedPart, weighted_sum, with_step
from orchestrator.types import Moments, ShardRecord
from tests.unit.orchestrator.algorithms.test_experience import logprobs, rollout, values

ROWS = (10, 11, 12)
X, Y = [1.0, 3.0, 8.0], [0.5, 0.0, 0.25]  # mean 4 and variance (9 + 1 + 16) / 2 = 13; mean 0.25 and variance 1/16
ROOT = math.sqrt(13.0)


def rewards(x=X, y=Y, failed=()):
    parts = [
        [] if number in failed else [("x", a), ("x.model", 9.0), ("y", b)]
        for number, (a, b) in enumerate(zip(x, y, strict=True))
    ]
    columns = {
        "row": pa.array(ROWS, pa.int32()),
        "reward": pa.array([None if n in failed else 2 * a + b for n, (a, b) in enumerate(zip(x, y, strict=True))]),
        "reward_parts": pa.array(parts, schema.REWARDS.field("reward_parts").type),
        "reward_error": pa.array(["down" if n in failed else None for n in range(3)], pa.string()),
        "tokens_cut": pa.array([0] * 3, pa.int32()),
    }
    return pa.table(columns).cast(schema.REWARDS)


def learned(sources, earlier=None, reward=None, **settings):
    """Token rewards at the last token of each row, without a KL penalty, and the table."""
    given = ExperienceSettings(Ppo(), samples_per_prompt=1, sources=sources, earlier=earlier or {}, **settings)
    table, dropped = assemble(
        rollout(),
        logprobs=[logprobs(-1.0)],
        ref_logprobs=[logprobs(-1.0)],
        values=[values()],
        rewards=[reward or rewards()],
        settings=given,
        kl_coefficient=0.0,
    )
    return [tokens[-1] for tokens in table["token_rewards"].to_pylist()], table, dropped


def test_a_shards_scores_are_standardised_before_they_are_weighted():
    sources = (WeightedPart("x", 2.0, "shard"), WeightedPart("y", 1.0))
    found, table, _ = learned(sources)
    assert found == pytest.approx([2 * -3 / ROOT + 0.5, 2 * -1 / ROOT, 2 * 4 / ROOT + 0.25])
    assert table["reward"].to_pylist() == [2.5, 6.0, 16.25], "the log keeps the reward itself"
    both, _, _ = learned((WeightedPart("x", 2.0, "shard"), WeightedPart("y", -1.0, "shard")))
    assert both == pytest.approx([2 * -3 / ROOT - 1.0, 2 * -1 / ROOT + 1.0, 2 * 4 / ROOT])


def test_a_running_source_uses_earlier_steps_and_the_first_step_its_shard():
    sources = (WeightedPart("x", 2.0, "running"), WeightedPart("y", 1.0))
    found, _, _ = learned(sources, {"x": Moments(4, 8.0, 28.0)})  # mean 2, variance (28 - 16) / 3 = 4
    assert found == pytest.approx([2 * -0.5 + 0.5, 2 * 0.5, 2 * 3.0 + 0.25])
    first, _, _ = learned(sources)
    assert first == pytest.approx([2 * -3 / ROOT + 0.5, 2 * -1 / ROOT, 2 * 4 / ROOT + 0.25])


def test_the_clip_applies_to_the_standardised_sum():
    found, _, _ = learned((WeightedPart("x", 2.0, "shard"), WeightedPart("y", 1.0)), reward_clip=1.0)
    assert found == pytest.approx([-1.0, 2 * -1 / ROOT, 1.0])


def test_a_failed_sample_is_dropped_and_counts_in_no_mean():
    found, table, dropped = learned(
        (WeightedPart("x", 1.0, "shard"), WeightedPart("y", 0.0)), reward=rewards(failed=(2,))
    )
    assert dropped == 1 and table["row"].to_pylist() == [10, 11]
    assert found == pytest.approx([-1 / math.sqrt(2), 1 / math.sqrt(2)])  # of 1 and 3


def test_equal_scores_teach_nothing_and_divide_by_nothing():
    total = weighted_sum({"x": np.array([5.0, 5.0])}, [WeightedPart("x", 3.0, "shard")], {})
    assert total.tolist() == [0.0, 0.0]
    one = weighted_sum({"x": np.array([5.0])}, [WeightedPart("x", 3.0, "shard")], {"x": Moments(9, 0.0, 9.0)})
    assert one.tolist() == [0.0]


def test_moments_are_those_of_all_samples_of_all_steps_however_they_are_cut():
    running = (WeightedPart("x", 1.0, "running"), WeightedPart("y", 1.0))
    _, table, _ = learned(running)
    shards = [summarise(part, ["x"])[1] for part in (table.slice(0, 1), table.slice(1))]
    assert not any("y_squares" in name for name in shards[0]), "only for running sources"
    assert summarise(table)[1].keys() == summarise(table, ["x"])[1].keys() - {"reward_part_x_squares_sum"}
    after = with_step({"x": Moments(4, 8.0, 28.0)}, [record(sums) for sums in shards])
    assert after == {"x": Moments(7, 8.0 + 12.0, 28.0 + 74.0)}
    assert after == with_step({"x": Moments(4, 8.0, 28.0)}, [record(summarise(table, ["x"])[1])])
    assert with_step({}, [record(summarise(table)[1])]) == {}


def record(sums):
    return ShardRecord("f", "", 0, 3, 0, 6, Moments(), sums, {})
