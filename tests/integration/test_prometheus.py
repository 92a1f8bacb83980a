"""A real Prometheus server finds the coordinator's endpoint through the run's file and scrapes it."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.watching.exposition import PrometheusEndpoint
from orchestrator.watching.metrics import METRICS, prometheus_name
from orchestrator.watching.telemetry import Telemetry
from tests.deadlines import scaled
from tests.ports import free_port

RUN_ID = "demo-1"
DEADLINE_S = scaled(15.0)
SERVER = shutil.which("prometheus")

pytestmark = pytest.mark.skipif(
    SERVER is None, reason="no prometheus on PATH; install Debian's package prometheus to run this test"
)


@pytest.fixture
def run_folder(tmp_path: Path) -> Iterator[Path]:
    """The folder of a run with an open endpoint that shows one step with all metrics."""
    folder = tmp_path / "runs" / RUN_ID
    folder.mkdir(parents=True)
    with PrometheusEndpoint(folder, RUN_ID, 1, host="127.0.0.1", port=0) as endpoint:
        with Telemetry(folder, RUN_ID, 1, prometheus=endpoint).step(0) as record:
            record(synthetic_step())
        yield folder


@pytest.fixture
def server(tmp_path: Path, run_folder: Path) -> Iterator[str]:
    """URL of a Prometheus server on loopback that scrapes the run every 200 ms."""
    config = tmp_path / "prometheus.yml"
    config.write_text(
        json.dumps(
            {
                "global": {"scrape_interval": "200ms", "scrape_timeout": "200ms"},
                "scrape_configs": [
                    {"job_name": "rlhf", "file_sd_configs": [{"files": [str(run_folder / "prometheus.json")]}]}
                ],
            }
        )
    )
    port = free_port()
    log = tmp_path / "prometheus.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [
                str(SERVER),
                f"--config.file={config}",
                f"--web.listen-address=127.0.0.1:{port}",
                f"--storage.tsdb.path={tmp_path / 'data'}",
                "--log.level=warn",
            ],
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for_scrape(url, process, log)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(timeout=scaled(10))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=scaled(10))


def synthetic_step() -> dict[str, float]:
    names = (name.replace("<name>", "style") for name in METRICS)
    return {name: float(number) for number, name in enumerate(names, start=1) if name != "tokens/total"}


def query(server: str, expression: str) -> list[dict[str, Any]]:
    url = f"{server}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    with urllib.request.urlopen(url, timeout=scaled(5)) as response:
        answer = json.load(response)
    assert answer["status"] == "success"
    return list(answer["data"]["result"])


def wait_for_scrape(server: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if query(server, 'rlhf_steps_total{job="rlhf"}'):
                return
        except (urllib.error.URLError, ConnectionError):
            pass
        time.sleep(0.1)
    pytest.fail(f"Prometheus did not scrape the run within {DEADLINE_S:.0f} s; it said:\n{log.read_text()}")


def test_a_server_scrapes_every_metric_of_the_catalogue(server: str) -> None:
    step = synthetic_step()
    for name, value in step.items():
        (found,) = query(server, prometheus_name(name))
        assert found["metric"]["run_id"] == RUN_ID
        if name not in ("time/step_s", "memory/coordinator_rss_bytes", "telemetry/non_finite"):  # measured, not ours
            assert float(found["value"][1]) == value
    assert float(query(server, "rlhf_tokens_total")[0]["value"][1]) == step["tokens/generated"]
    assert query(server, "rlhf_run_info")[0]["metric"]["attempt"] == "1"
    assert query(server, 'up{job="rlhf"}')[0]["value"][1] == "1"
    series = query(server, 'count by (run_id) ({__name__=~"rlhf_.*"})')
    assert [entry["metric"] for entry in series] == [{"run_id": RUN_ID}]
