"""The coordinator's Prometheus endpoint: a separate registry, gauges created on first use, one label (`run_id`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from orchestrator.errors import ConfigError
from orchestrator.run.storage import write_json
from orchestrator.watching.metrics import lookup, prometheus_name

ADDRESS_FILE = "prometheus.json"
_CLOSE_TIMEOUT_S = 5.0


class _Latest(Collector):
    """The newest value of each metric. HTTP threads read an immutable mapping that updates replace."""

    def __init__(self, run_id: str, attempt: int) -> None:
        self._run_id, self._attempt = run_id, attempt
        self._gauges: Mapping[str, float] = MappingProxyType({})
        self._num_steps = 0
        self._num_tokens = 0.0

    def update(self, gauges: Mapping[str, float], *, steps: int, tokens: float) -> None:
        self._num_steps += steps
        self._num_tokens += tokens
        self._gauges = MappingProxyType({**self._gauges, **gauges})

    def collect(self) -> Iterable[Metric]:
        info = InfoMetricFamily("rlhf_run", "The run of this process")
        info.add_metric([], {"run_id": self._run_id, "attempt": str(self._attempt)})
        yield info
        counters = {
            "rlhf_steps": ("Steps finished by this process", float(self._num_steps)),
            "rlhf_tokens": ("Response tokens of the steps finished by this process", self._num_tokens),
        }
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(name, text, labels=["run_id"])
            counter.add_metric([self._run_id], value)
            yield counter
        for name, value in self._gauges.items():
            entry = lookup(name)
            gauge = GaugeMetricFamily(prometheus_name(name), entry.help if entry else name, labels=["run_id"])
            gauge.add_metric([self._run_id], value)
            yield gauge


class PrometheusEndpoint:
    """Serves `http://host:port/metrics` from a daemon thread until closed.

    The address is in `address` and, in the format of Prometheus' `file_sd_configs`, in folder/prometheus.json while
    the endpoint is open.

    Args:
        port: 0: any free port.

    Raises:
        ConfigError: the address can't be bound.
    """

    def __init__(self, folder: Path, run_id: str, attempt: int, *, host: str, port: int) -> None:
        self._latest = _Latest(run_id, attempt)
        registry = CollectorRegistry()
        registry.register(self._latest)
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"telemetry.prometheus_host={host!r}, telemetry.prometheus_port={port}: can't listen there "
                f"({error}). Set the port to 0 for any free port, to another number, or to null for no endpoint."
            ) from None
        self.host, self.port = host, int(self._server.server_port)
        self._file = folder / ADDRESS_FILE
        write_json(self._file, [{"targets": [self.address], "labels": {"job": "rlhf"}}])

    @property
    def address(self) -> str:
        """host:port, with an IPv6 host in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def update(self, metrics: Mapping[str, float], *, steps: int, tokens: float) -> None:
        """Serves these values and increments the counters. Ignores metrics of the catalogue that are counters."""
        gauges = {name: value for name, value in metrics.items() if not _is_counter(name)}
        self._latest.update(gauges, steps=steps, tokens=tokens)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.unlink(missing_ok=True)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(_CLOSE_TIMEOUT_S)

    def __enter__(self) -> PrometheusEndpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _is_counter(name: str) -> bool:
    entry = lookup(name)
    return entry is not None and entry.kind == "counter"
