"""Gauges and counters that actors report through Ray's metrics agents; outside Ray only the totals are kept."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.util import metrics as ray_metrics

from orchestrator.watching.metrics import ACTOR_METRICS
from orchestrator.watching.telemetry import resident_bytes

_TAGS = ("run_id", "role", "rank")


class ActorMetrics:
    """The metrics of one actor, with tags `run_id`, `role`, `rank`. Call it once per request, not per token.

    `busy_s` and `tokens` are totals of this object; `take_busy_s` is for summaries that go to the coordinator.
    """

    def __init__(self, run_id: str, role: str, rank: int) -> None:
        self.busy_s = 0.0
        self.tokens = 0
        self._taken_s = 0.0
        self._lock = threading.Lock()
        self._num_working = 0
        self._since = 0.0
        self._gauges: dict[str, ray_metrics.Gauge] = {}
        self._counters: dict[str, ray_metrics.Counter] = {}
        if not ray.is_initialized():
            return
        tags = {"run_id": run_id, "role": role, "rank": str(rank)}
        for name, metric in ACTOR_METRICS.items():
            if metric.kind == "counter":
                self._counters[name] = ray_metrics.Counter(name, description=metric.help, tag_keys=_TAGS)
                self._counters[name].set_default_tags(tags)
            else:
                self._gauges[name] = ray_metrics.Gauge(name, description=metric.help, tag_keys=_TAGS)
                self._gauges[name].set_default_tags(tags)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Counts the time inside as busy, even after an exception, then reports memory.

        Overlapping requests, in threads or tasks, count once.
        """
        self._enter()
        try:
            yield
        finally:
            self._leave()
            self.report_memory()

    def take_busy_s(self) -> float:
        """Busy seconds since the last call."""
        taken = self.busy_s - self._taken_s
        self._taken_s = self.busy_s
        return taken

    def add_tokens(self, tokens: int) -> None:
        self.tokens += tokens
        self._increase("rlhf_actor_tokens", float(tokens))

    def set_weights_version(self, version: int) -> None:
        self._set("rlhf_actor_weights_version", float(version))

    def report_memory(self) -> int:
        """Reports and returns the resident bytes of this process."""
        num_bytes = resident_bytes()
        self._set("rlhf_actor_rss_bytes", float(num_bytes))
        return num_bytes

    def _enter(self) -> None:
        with self._lock:
            if not self._num_working:
                self._since = time.monotonic()
            self._num_working += 1

    def _leave(self) -> None:
        with self._lock:
            self._num_working -= 1
            if self._num_working:
                return
            seconds = time.monotonic() - self._since
            self.busy_s += seconds
        self._increase("rlhf_actor_busy_seconds", seconds)

    def _set(self, name: str, value: float) -> None:
        if name in self._gauges:
            self._gauges[name].set(value)

    def _increase(self, name: str, value: float) -> None:
        if name in self._counters and value > 0.0:  # Ray rejects an increment of 0
            self._counters[name].inc(value)
