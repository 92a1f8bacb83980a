"""Figures of the service for Prometheus, in a registry of its own."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import func, select

from jobs.services.labelling.store import Store
from jobs.services.labelling.tables import items, judgements
from jobs.services.labelling.waiting.batches import counted


class Meters:
    def __init__(self, store: Store) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "rlhf_label_requests", "Requests, by status of the answer", ["status"], registry=self.registry
        )
        self.seconds = Histogram(
            "rlhf_label_request_seconds",
            "Time to answer a request of the API",
            registry=self.registry,
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10),
        )
        self.registry.register(_Stored(store))


class _Stored(Collector):
    """Counts of what the store holds, at the time of a scrape."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        with self._store.reading() as connection:
            by_kind = counted(connection, items.c.kind)
            undone = connection.scalar(
                select(func.count()).select_from(judgements).where(judgements.c.undone_at.is_not(None))
            )
        columns = {
            "rlhf_label_items": ("Items", 1),
            "rlhf_label_judgements": ("Judgements, without those that were undone", 2),
            "rlhf_label_missing": ("Judgements that are missing", 3),
        }
        for name, (text, column) in columns.items():
            gauge = GaugeMetricFamily(name, text, labels=["kind"])
            for row in by_kind:
                gauge.add_metric([row[0]], float(row[column] or 0))
            yield gauge
        yield GaugeMetricFamily("rlhf_label_undone", "Judgements that were undone", value=float(undone or 0))
