"""The samples of a step depend only on the run seed and the step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from orchestrator.data.records import PromptRecord
from orchestrator.errors import ConfigError, DataError
from orchestrator.prompts import PromptSchedule, Splits, derive_seed, split
from orchestrator.types import Prompt

GOLDEN = [(0, "p1", 0, 5998576260272155929), (1, "p4", 0, 7961698260705629268)]


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"p{i}", f"text {i}", np.array([i], dtype=np.int32)) for i in range(count)]


def schedule(count: int, *, seed: int = 7, per_step: int = 4, samples: int = 2) -> PromptSchedule:
    return PromptSchedule(prompts(count), seed=seed, prompts_per_step=per_step, samples_per_prompt=samples)


def asked(plan: PromptSchedule, step: int) -> list[tuple[int, str, int, int]]:
    return [(r.row, r.prompt.id, r.sample_index, r.seed) for r in plan.requests(step)]


def test_a_step_asks_for_the_same_whether_or_not_earlier_steps_were_asked_for() -> None:
    plan = schedule(10)
    in_order = [asked(plan, step) for step in range(8)]
    assert [asked(schedule(10), step) for step in reversed(range(8))] == in_order[::-1]
    assert in_order != [asked(schedule(10, seed=8), step) for step in range(8)]


def test_the_order_and_seeds_are_golden() -> None:
    assert asked(schedule(5, seed=1, per_step=2, samples=1), 3) == GOLDEN


def test_every_prompt_comes_once_an_epoch_in_another_order_each_epoch() -> None:
    plan = schedule(10, samples=1)
    ids = [request.prompt.id for step in range(5) for request in plan.requests(step)]
    first, second = ids[:10], ids[10:]
    assert sorted(first) == sorted(second) == sorted(p.id for p in prompts(10))
    assert first != second
    assert [plan.epoch(step) for step in range(5)] == [0, 0, 0, 1, 1]


def test_rows_number_the_samples_and_group_them_by_prompt() -> None:
    requests = schedule(10).requests(0)
    assert [r.row for r in requests] == list(range(8))
    assert [r.sample_index for r in requests] == [0, 1] * 4
    assert all(requests[i].prompt is requests[i + 1].prompt for i in range(0, 8, 2))


def test_no_two_requests_share_a_seed_even_with_fewer_prompts_than_a_step_wants() -> None:
    plan = schedule(3, per_step=7)
    seeds = [request.seed for step in range(50) for request in plan.requests(step)]
    assert len(set(seeds)) == len(seeds) == 700
    assert all(0 <= seed < 2**63 for seed in seeds)
    counts = Counter(request.prompt.id for request in plan.requests(0))
    assert sorted(counts.values()) == [4, 4, 6]


def test_no_prompts_is_a_data_error() -> None:
    with pytest.raises(DataError, match="no prompts are left"):
        schedule(0)


def test_derived_seeds_tell_their_parts_apart() -> None:
    assert derive_seed("a", 1) != derive_seed("a", "1") != derive_seed("a1")
    assert derive_seed("a", -1) != derive_seed("a", 1)


def records(count: int) -> list[PromptRecord]:
    return [PromptRecord(f"id{i}", (), "") for i in range(count)]


def parts_of(records: Sequence[PromptRecord], **settings: Any) -> Splits[PromptRecord]:
    found: dict[str, list[PromptRecord]] = {"train": [], "reward_model": [], "held_out": []}
    for record, part in split(records, **settings):
        found[part].append(record)
    return Splits(**found)


def test_split_is_disjoint_complete_and_near_its_fractions() -> None:
    everything = records(5000)
    parts = parts_of(everything, held_out_fraction=0.2, reward_model_fraction=0.4)
    sizes = [len(parts.held_out), len(parts.reward_model), len(parts.train)]
    assert sum(sizes) == 5000
    assert sorted(r.id for part in (parts.held_out, parts.reward_model, parts.train) for r in part) == sorted(
        r.id for r in everything
    )
    assert np.allclose(np.array(sizes) / 5000, [0.2, 0.4, 0.4], atol=0.03)


def test_a_prompt_keeps_its_part_when_the_others_change() -> None:
    whole = parts_of(records(100), held_out_fraction=0.3, reward_model_fraction=0.3)
    half = parts_of(records(100)[::-2], held_out_fraction=0.3, reward_model_fraction=0.3)
    assert {r.id for r in half.held_out} <= {r.id for r in whole.held_out}
    assert {r.id for r in half.train} <= {r.id for r in whole.train}


def test_a_part_splits_again_under_another_salt() -> None:
    part = parts_of(records(2000), held_out_fraction=0.2, reward_model_fraction=0.4).reward_model
    again = parts_of(part, held_out_fraction=0.1, reward_model_fraction=0.0, salt="again")
    assert 0.05 < len(again.held_out) / len(part) < 0.15
    assert not parts_of(part, held_out_fraction=0.1, reward_model_fraction=0.0).held_out


def test_fractions_of_nothing_and_of_all() -> None:
    assert len(parts_of(records(50), held_out_fraction=0.0, reward_model_fraction=0.0).train) == 50
    assert len(parts_of(records(50), held_out_fraction=0.0, reward_model_fraction=1.0).reward_model) == 50
    assert not parts_of(records(500), held_out_fraction=0.7, reward_model_fraction=0.3).train
    with pytest.raises(ConfigError, match="add up to more than 1"):
        parts_of(records(1), held_out_fraction=0.7, reward_model_fraction=0.4)


def test_greedy_samples_follow_those_of_their_prompt() -> None:
    plan = PromptSchedule(prompts(5), seed=1, prompts_per_step=2, samples_per_prompt=2, greedy_samples=1)
    found = plan.requests(3)
    assert [request.row for request in found] == list(range(6))
    assert [request.is_greedy for request in found] == [False, False, True] * 2
    assert len({request.prompt.id for request in found[:3]}) == 1
    plain = schedule(5, seed=1, per_step=2, samples=2).requests(3)
    assert [request.seed for request in found if not request.is_greedy] == [request.seed for request in plain]


def test_refills_are_other_draws_that_depend_on_the_step_alone() -> None:
    plan = schedule(10)
    step = plan.requests(2)
    refills = [plan.requests(2, refill) for refill in (1, 2)]
    everything = [*step, *refills[0], *refills[1]]
    assert [request.row for request in everything] == list(range(3 * len(step)))
    assert len({request.seed for request in everything}) == len(everything)
    assert [request.seed for request in refills[0]] == [request.seed for request in schedule(10).requests(2, 1)]
    assert {request.prompt.id for request in refills[0]} != {request.prompt.id for request in refills[1]}
    # More prompts than there are: some occur twice.
    assert len(schedule(3, per_step=5).requests(0, 1)) == 10
