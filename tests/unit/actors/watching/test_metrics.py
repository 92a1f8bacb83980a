from __future__ import annotations

import time

import pytest
import ray

from actors.watching import metrics
from actors.watching.metrics import ActorMetrics


class Instrument:
    """Records the values of a gauge or counter of ray.util.metrics."""

    made: dict[str, Instrument] = {}

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.tag_keys = tag_keys
        self.tags: dict[str, str] = {}
        self.values: list[float] = []
        Instrument.made[name] = self

    def set_default_tags(self, tags: dict[str, str]) -> None:
        self.tags = tags

    def set(self, value: float) -> None:
        self.values.append(value)

    def inc(self, value: float) -> None:
        if value <= 0:
            raise ValueError("value must be > 0")  # like Ray
        self.values.append(value)


@pytest.fixture
def inside_ray(monkeypatch: pytest.MonkeyPatch) -> dict[str, Instrument]:
    Instrument.made = {}
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(metrics.ray_metrics, "Gauge", Instrument)
    monkeypatch.setattr(metrics.ray_metrics, "Counter", Instrument)
    return Instrument.made


def test_outside_ray_totals_are_kept_and_nothing_is_made(monkeypatch):
    monkeypatch.setattr(metrics.ray_metrics, "Gauge", None)
    monkeypatch.setattr(metrics.ray_metrics, "Counter", None)
    actor = ActorMetrics("demo-1", "policy", 0)
    with actor.working():
        time.sleep(0.02)
    actor.add_tokens(7)
    actor.add_tokens(5)
    actor.set_weights_version(3)
    assert actor.tokens == 12
    assert 0.02 <= actor.busy_s < 2.0
    assert actor.report_memory() > 1_000_000


def test_inside_ray_everything_is_tagged_with_run_role_and_rank(inside_ray):
    actor = ActorMetrics("demo-1", "rollout", 2)
    with actor.working():
        actor.add_tokens(40)
    actor.set_weights_version(3)
    assert set(inside_ray) == {
        "rlhf_actor_rss_bytes",
        "rlhf_actor_busy_seconds",
        "rlhf_actor_tokens",
        "rlhf_actor_weights_version",
    }
    for instrument in inside_ray.values():
        assert instrument.tags == {"run_id": "demo-1", "role": "rollout", "rank": "2"}
        assert set(instrument.tag_keys) == set(instrument.tags)
        assert len(instrument.values) == 1
    assert inside_ray["rlhf_actor_tokens"].values == [40.0]
    assert inside_ray["rlhf_actor_weights_version"].values == [3.0]


def test_no_tokens_add_nothing(inside_ray):
    ActorMetrics("demo-1", "rollout", 0).add_tokens(0)
    assert inside_ray["rlhf_actor_tokens"].values == []


def test_work_that_fails_counts_as_busy(inside_ray):
    actor = ActorMetrics("demo-1", "critic", 0)
    with pytest.raises(RuntimeError, match="boom"), actor.working():
        raise RuntimeError("boom")
    assert actor.busy_s > 0.0
    assert len(inside_ray["rlhf_actor_busy_seconds"].values) == 1


def test_requests_that_overlap_count_once():
    actor = ActorMetrics("demo-1", "rollout", 0)
    started = time.monotonic()
    with actor.working(), actor.working():
        time.sleep(0.05)
    assert 0.05 <= actor.busy_s <= time.monotonic() - started


def test_taken_busy_seconds_are_handed_out_once():
    actor = ActorMetrics("demo-1", "critic", 0)
    with actor.working():
        time.sleep(0.01)
    first = actor.take_busy_s()
    with actor.working():
        time.sleep(0.01)
    assert first + actor.take_busy_s() == pytest.approx(actor.busy_s)
    assert actor.take_busy_s() == 0.0
