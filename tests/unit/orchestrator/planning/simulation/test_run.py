"""The loop over simulated roles: exact if a step can be computed manually, otherwise ordered."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from orchestrator.planning import costs
from orchestrator.planning.costs import Dimensions, LearnSettings
from orchestrator.planning.hardware import DEVICES
from orchestrator.planning.simulation import virtual_time
from orchestrator.planning.simulation.run import simulate, simulate_steps
from orchestrator.planning.simulation.scenario import MODELS, Layout, Measured, Pool, Spread, Work
from orchestrator.planning.simulation.virtual_time import VirtualTimeLoop

SIZE = Dimensions(494_032_768, 24, 896, 4864, 151_936, kv_width=128, tied=True)
FREE_CALLS = replace(DEVICES["h100"].efficiency, call_s=0.0)
DEVICE = replace(DEVICES["h100"], efficiency=FREE_CALLS)
WORK = Work(dict.fromkeys(MODELS, SIZE), 64, Spread(100, 100), Spread(200, 200))
CACHE = 1e6
LEARNING = LearnSettings(minibatches=2)


def colocated(devices: int, *, engines: int = 1) -> Layout:
    widths = dict.fromkeys(MODELS, devices) | {"rollout": 1}
    learning = dict.fromkeys(MODELS, LEARNING)
    return Layout(DEVICE, (Pool(devices, widths),), engines, WORK.samples // engines, learning=learning)


def separate(*, max_staleness: int, device=DEVICE) -> Layout:  # type: ignore[no-untyped-def]
    pools = (Pool(2, {"rollout": 1}), *(Pool(1, {role: 1}) for role in MODELS))
    return Layout(device, pools, 2, 32, max_staleness, learning=dict.fromkeys(MODELS, LEARNING))


def test_a_synchronous_step_is_the_sum_of_its_parts() -> None:
    prompts, responses = np.full(64, 100), np.full(64, 200)
    generate = costs.generate_seconds(
        SIZE, DEVICE, width=1, prompt_tokens=prompts, new_tokens=responses, cache_tokens=CACHE
    )
    moved = costs.rest_seconds(SIZE, DEVICE, LEARNING, ranks=1)  # states of policy and critic, out and in
    score, learn = (
        [
            work(SIZE, DEVICE, LEARNING, ranks=1, lengths=prompts + responses, head_tokens=head)
            for head in (64 * 200.0, 0.0)
        ]
        for work in (costs.score_seconds, costs.learn_seconds)
    )
    publish = costs.publish_seconds(SIZE, DEVICE, devices=1)
    by_hand = generate + 4 * moved + 2 * sum(score) + sum(learn) + publish

    told = simulate(WORK, colocated(1), cache_tokens=CACHE)

    assert told.step_s == pytest.approx(by_hand, rel=1e-12)
    assert sum(told.phases_s.values()) == pytest.approx(by_hand, rel=1e-12)
    assert told.idle_devices == pytest.approx(0.0, abs=1e-9)
    assert told.idle["rollout"] == pytest.approx(1 - (generate + publish) / by_hand)
    assert told.generated_per_s == pytest.approx(64 * 200 / by_hand)


def test_a_pipelined_step_takes_less_than_a_synchronous_one_and_no_less_than_its_longest_part() -> None:
    synchronous = simulate(WORK, separate(max_staleness=0), cache_tokens=CACHE)
    pipelined = simulate(WORK, separate(max_staleness=1), cache_tokens=CACHE)
    assert pipelined.step_s < synchronous.step_s
    assert pipelined.step_s >= max(synchronous.phases_s["generate"], synchronous.phases_s["learn"])
    assert pipelined.idle_devices < synchronous.idle_devices


def test_more_gpus_never_make_a_step_of_the_same_batch_slower() -> None:
    fast = replace(DEVICE, link=1e15, network=1e15)
    seconds = [
        simulate(WORK, replace(colocated(count, engines=count), device=fast, deals_on=True), cache_tokens=CACHE).step_s
        for count in (1, 2, 4, 8, 16, 32, 64)
    ]
    assert seconds == sorted(seconds, reverse=True)


def test_calls_of_the_coordinator_come_on_top() -> None:
    slow = replace(DEVICE, efficiency=replace(FREE_CALLS, call_s=0.01, step_s=1.0))
    fast, dear = (
        simulate(WORK, separate(max_staleness=0, device=device), cache_tokens=CACHE) for device in (DEVICE, slow)
    )
    assert dear.step_s > fast.step_s + 1.0


def test_a_role_without_a_model_costs_nothing() -> None:
    rules = replace(WORK, models={**WORK.models, "reward": None, "critic": None})
    told = simulate(rules, colocated(1), cache_tokens=CACHE)
    assert told.step_s < simulate(WORK, colocated(1), cache_tokens=CACHE).step_s
    assert set(told.idle) == {"rollout", "policy", "reference"}


def test_lengths_that_were_measured_are_taken_step_by_step() -> None:
    short, long = ((np.full(64, 100), np.full(64, tokens)) for tokens in (50, 200))
    measured = Measured(WORK.models, 64, WORK.prompt, WORK.response, (short, long))
    first, second = simulate_steps(measured, colocated(1), cache_tokens=CACHE, steps=2)
    assert (first["tokens/generated"], second["tokens/generated"]) == (64 * 50, 64 * 200)
    assert first["time/step_s"] < second["time/step_s"]


def test_money_is_devices_times_hours_and_unknown_without_a_price() -> None:
    layout = colocated(4, engines=4)
    told = simulate(WORK, layout, cache_tokens=CACHE)
    assert told.money(layout, steps=10) == pytest.approx(3.24 * 4 * 10 * told.step_s / 3600)
    assert told.money(replace(layout, device=DEVICES["h200"])) is None


def test_lengths_have_their_mean_and_their_limit_and_are_the_same_again() -> None:
    spread = Spread(100, 300, 0.5)
    drawn = spread.draw(20_000, (7,))
    assert drawn.mean() == pytest.approx(100, rel=0.03)
    assert drawn.max() <= 300
    assert np.array_equal(drawn, spread.draw(20_000, (7,)))


def test_four_thousand_gpus_are_simulated() -> None:
    many = replace(WORK, samples=4096)
    layout = replace(colocated(4096, engines=4096), samples_per_shard=4)
    assert simulate(many, layout, cache_tokens=CACHE).step_s > 0


def test_virtual_hours_pass_at_once_and_exactly() -> None:
    loop = VirtualTimeLoop()
    try:
        loop.run_until_complete(asyncio.wait_for(asyncio.sleep(7 * 3600.5), timeout=8 * 3600))
        assert loop.time() == 7 * 3600.5
    finally:
        loop.close()


def test_a_simulation_that_is_stuck_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtual_time, "_REAL_WAIT_S", 0.01)
    loop = VirtualTimeLoop()
    try:
        with pytest.raises(RuntimeError, match="never happens"):
            loop.run_until_complete(loop.create_future())
    finally:
        loop.close()


def test_samples_that_share_a_prompt_cost_less_where_it_is_computed_once() -> None:
    alone = replace(WORK, models={**WORK.models, "critic": None}, prompt=Spread(100, 200, 0.5))
    shared = replace(alone, sharing=4)
    prompts, _ = shared.lengths(0)
    assert len(prompts) == 64 and all(len(set(prompts[start : start + 4])) == 1 for start in range(0, 64, 4))
    apart_s, shared_s = (simulate(work, colocated(1), cache_tokens=CACHE).phases_s for work in (alone, shared))
    assert shared_s["learn"] < 0.9 * apart_s["learn"]
    assert shared_s["score"] < apart_s["score"]


def test_greedy_samples_are_sampled_and_scored_and_not_learned() -> None:
    """Three samples of a prompt and a greedy one cost what four cost, except in learning."""
    alone = replace(WORK, models={**WORK.models, "critic": None})
    with_greedy, four, three = (
        replace(alone, samples=samples, sharing=sharing, greedy=greedy)
        for samples, sharing, greedy in ((48, 3, 1), (64, 4, 0), (48, 3, 0))
    )
    prompts, responses = with_greedy.lengths(0)
    assert len(prompts) == len(responses) == with_greedy.scored == 64
    assert with_greedy.are_learned(2, 5).tolist() == [True, False, True, True, True]
    found, more, fewer = (
        simulate(work, colocated(1), cache_tokens=CACHE).phases_s for work in (with_greedy, four, three)
    )
    assert found["generate"] == pytest.approx(more["generate"]) and found["score"] == pytest.approx(more["score"])
    assert found["learn"] == pytest.approx(fewer["learn"]) and found["learn"] < more["learn"]


def test_a_further_round_is_sampled_and_scored_and_not_learned() -> None:
    once, twice = (
        simulate(replace(WORK, rounds=rounds), colocated(1), cache_tokens=CACHE).phases_s for rounds in (0, 1)
    )
    moved = costs.wake_seconds(SIZE, DEVICE, width=1)  # the engine's weights, to the host, back, and to the host
    sampled = once["generate"] + once["score"]
    assert twice["generate"] + twice["score"] == pytest.approx(2 * sampled + 3 * moved)
    assert twice["score"] > once["score"]
    assert twice["learn"] == pytest.approx(once["learn"])


def test_roles_on_the_policys_trunk_compute_on_its_ranks() -> None:
    """Colocated on one device it makes no difference; on devices of their own they would compute at the same time."""
    shared = replace(WORK, on_trunk=frozenset({"critic", "reference"}))
    one, other = (simulate(work, colocated(1), cache_tokens=CACHE) for work in (WORK, shared))
    assert other.step_s == pytest.approx(one.step_s)
    assert set(other.idle) == {"policy", "reward", "rollout"}
    apart = simulate(WORK, separate(max_staleness=0), cache_tokens=CACHE)
    together = simulate(shared, separate(max_staleness=0), cache_tokens=CACHE)
    assert together.step_s > apart.step_s
