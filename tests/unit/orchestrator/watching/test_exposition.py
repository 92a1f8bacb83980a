from __future__ import annotations

import json
import math
import socket
import urllib.request
from pathlib import Path

import pytest

from orchestrator.errors import ConfigError
from orchestrator.watching.exposition import PrometheusEndpoint
from orchestrator.watching.metrics import METRICS, prometheus_name
from orchestrator.watching.telemetry import Telemetry
from tests.deadlines import scaled


def scrape(endpoint: PrometheusEndpoint) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{endpoint.address}/metrics", timeout=scaled(10)) as response:
        text = response.read().decode()
    samples = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in samples}


@pytest.fixture
def endpoint(tmp_path: Path):
    with PrometheusEndpoint(tmp_path, "demo-1", 2, host="127.0.0.1", port=0) as opened:
        yield opened


def test_every_metric_of_the_catalogue_is_exposed_once_recorded(endpoint, tmp_path):
    values = {
        metric.name.replace("<name>", "style"): float(number) for number, metric in enumerate(METRICS.values(), 1)
    }
    telemetry = Telemetry(tmp_path, "demo-1", 2, prometheus=endpoint)
    with telemetry.step(0) as record:
        record(values)
    exposed = scrape(endpoint)
    for name in values:
        assert f'{prometheus_name(name)}{{run_id="demo-1"}}' in exposed
    assert exposed['rlhf_reward_mean{run_id="demo-1"}'] == values["reward/mean"]
    assert exposed['rlhf_run_info{attempt="2",run_id="demo-1"}'] == 1.0


def test_the_only_label_is_the_run(endpoint, tmp_path):
    with Telemetry(tmp_path, "demo-1", 2, prometheus=endpoint).step(0) as record:
        record({"reward/mean": 1.0, "a/new/name": 3.0})
    labels = {name.partition("{")[2] for name in scrape(endpoint) if not name.startswith("rlhf_run_info")}
    assert labels == {'run_id="demo-1"}'}
    assert scrape(endpoint)['rlhf_a_new_name{run_id="demo-1"}'] == 3.0


def test_counters_count_what_this_process_finished(endpoint, tmp_path):
    for attempt in (1, 2):
        telemetry = Telemetry(tmp_path, "demo-1", attempt, prometheus=endpoint if attempt == 2 else None)
        telemetry.rewind(attempt)
        for step in range(attempt, attempt + 2):
            with telemetry.step(step) as record:
                record({"tokens/generated": 50})
    exposed = scrape(endpoint)
    assert exposed['rlhf_steps_total{run_id="demo-1"}'] == 2.0
    assert exposed['rlhf_tokens_total{run_id="demo-1"}'] == 100.0


def test_a_value_that_is_not_finite_is_shown_as_such(endpoint, tmp_path):
    with Telemetry(tmp_path, "demo-1", 2, prometheus=endpoint).step(0) as record:
        record({"policy/loss": math.nan})
    assert math.isnan(scrape(endpoint)['rlhf_policy_loss{run_id="demo-1"}'])


def test_the_address_is_written_for_service_discovery_while_open(tmp_path):
    with PrometheusEndpoint(tmp_path, "demo-1", 1, host="127.0.0.1", port=0) as endpoint:
        assert endpoint.port > 0
        found = json.loads((tmp_path / "prometheus.json").read_text())
        assert found == [{"targets": [f"127.0.0.1:{endpoint.port}"], "labels": {"job": "rlhf"}}]
    assert not (tmp_path / "prometheus.json").exists()


def test_a_taken_port_is_a_config_error_with_a_way_out(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"prometheus_port={port}.*already in use.*Set the port to 0"):
            PrometheusEndpoint(tmp_path, "demo-1", 1, host="127.0.0.1", port=port)


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70000), ("203.0.113.7", 0)])
def test_an_impossible_address_is_a_config_error(tmp_path, host, port):
    with pytest.raises(ConfigError, match="telemetry.prometheus_host"):
        PrometheusEndpoint(tmp_path, "demo-1", 1, host=host, port=port)


def test_closing_frees_the_port(tmp_path):
    with PrometheusEndpoint(tmp_path, "demo-1", 1, host="127.0.0.1", port=0) as first:
        port = first.port
    with PrometheusEndpoint(tmp_path, "demo-1", 1, host="127.0.0.1", port=port) as second:
        assert second.port == port
        assert 'rlhf_steps_total{run_id="demo-1"}' in scrape(second)
