"""Runs that are stopped or continued, or get no answer. `make chaos` runs them; unit tests cover their parts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from jobs.stops import STOPPED
from orchestrator.watching.guards import PAUSED_FILE
from tests.chaos.conftest import assert_as_quiet, blow
from tests.chaos.matrix import ROOT, RUN_S, Field, Outcome, actors_left
from tests.deadlines import scaled

pytestmark = [pytest.mark.ray, pytest.mark.heavy, pytest.mark.slow, pytest.mark.timeout(scaled(900))]


def test_a_stopped_run_saves_where_it_stands_and_goes_on_from_there(here: Field, quiet: Outcome) -> None:
    plan = [blow("driver", 3, "score", "TERM")]
    first = here.attempt("stopped", plan)
    assert first.returncode == 130, first.stdout
    assert actors_left() == []
    assert (here.run_folder("stopped") / "checkpoints" / "step-000003" / "COMPLETE").exists()
    outcome = here.run("stopped")
    assert_as_quiet(outcome, quiet)
    (restored,) = outcome.events("restored")
    assert restored["table"]["learned again from the log"] == "nothing"


def started(here: Field, run_id: str, environment: Mapping[str, str], *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jobs", "run", "--config", str(here.folder / "config.yaml"), f"run.id={run_id}"]
    return subprocess.Popen(
        [*command, *overrides],
        cwd=ROOT,
        env={**environment, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def reach(process: subprocess.Popen[str], line: str) -> str:
    """Reads up to a line that contains `line`."""
    assert process.stdout is not None
    read = ""
    for text in process.stdout:
        read += text
        if line in text:
            return read
    raise AssertionError(f"it ended before {line!r}:\n{read}")


def test_all_processes_told_to_stop_at_once_end_quickly_and_the_run_goes_on(here: Field, quiet: Outcome) -> None:
    """As Slurm and systemd do. The run has a private Ray, whose processes end too."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with started(here, "tree", environment) as run:
        reach(run, "rl 3/")
        family = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
        assert len(family) > 10
        begun = time.monotonic()
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        output, _ = run.communicate(timeout=scaled(60))
    assert time.monotonic() - begun < scaled(30)
    assert (run.returncode, output.splitlines()[-1]) == (130, STOPPED), output
    assert actors_left() == []
    assert_as_quiet(here.run("tree"), quiet)


def test_stopped_while_actors_start_the_run_says_so_and_goes_on(here: Field, quiet: Outcome) -> None:
    with started(here, "early", {**os.environ, "RAY_ADDRESS": here.address}) as run:
        reach(run, "placement:")
        run.send_signal(signal.SIGHUP)
        output, _ = run.communicate(timeout=scaled(60))
    assert (run.returncode, output.splitlines()[-1]) == (130, STOPPED), output
    assert actors_left() == []
    assert_as_quiet(here.run("early"), quiet)


def test_a_second_start_of_a_live_run_waits_and_is_refused_and_the_first_ends_as_ever(
    here: Field, quiet: Outcome
) -> None:
    environment = {**os.environ, "RAY_ADDRESS": here.address}
    with started(here, "twice", environment) as first:
        reach(first, "rl: all roles are ready")
        with started(here, "twice", environment, "placement.wait_s=3") as second:
            refused, _ = second.communicate(timeout=scaled(120))
        assert second.returncode == 2, refused
        assert f"attempt 1 (process {first.pid} on" in refused
        output, _ = first.communicate(timeout=RUN_S)
    assert first.returncode == 0, output
    assert_as_quiet(here.run("twice"), quiet)


def test_a_run_of_three_steps_and_then_of_all_ends_as_one_of_all(here: Field, quiet: Outcome) -> None:
    assert here.run("halves", (), "rl.steps=3").code == 0
    assert_as_quiet(here.run("halves"), quiet)
    again = here.run("halves")
    assert "nothing is left to do" in again.output


def test_a_guard_stops_a_run_and_without_it_the_run_ends_as_a_quiet_one(here: Field, quiet: Outcome) -> None:
    stopped = here.run("guarded", (), "guards.entropy.min=100")
    assert stopped.code == 3, stopped.output
    assert "policy/entropy" in stopped.output
    assert actors_left() == []
    assert_as_quiet(here.run("guarded"), quiet)


def test_a_paused_run_waits_for_a_person_and_ends_as_a_quiet_one(here: Field, quiet: Outcome) -> None:
    done = threading.Event()
    reasons: list[str] = []

    def person() -> None:
        paused = here.run_folder("paused") / PAUSED_FILE
        while not done.wait(0.2):
            if paused.exists():
                reasons.append(paused.read_text(encoding="utf-8"))
                paused.unlink()

    watching = threading.Thread(target=person)
    watching.start()
    try:
        outcome = here.run("paused", (), "guards.length={max: 1, action: pause}", "guards.kl={max: 1e-9, action: warn}")
    finally:
        done.set()
        watching.join()
    assert_as_quiet(outcome, quiet)
    assert reasons and all("length" in reason for reason in reasons)
    assert {event["action"] for event in outcome.events("guard")} == {"pause", "warn"}


def test_a_reward_endpoint_that_never_answers_is_named_and_ends_the_run(here: Field) -> None:
    answers = threading.Semaphore(4)  # includes the preflight and the first samples

    class Silent(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not answers.acquire(blocking=False):
                silence.wait()
            content = json.dumps({"rewards": [0.0] * len(body["samples"])}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None: ...

    silence = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Silent)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        outcome = here.run(
            "silent",
            (),
            f"reward={{name: http, url: '{url}', timeout_s: 500}}",
            "deadlines.score_s=12",
            "failures.infrastructure=1",
        )
    finally:
        silence.set()
        server.shutdown()
        server.server_close()
    assert outcome.code == 1, outcome.output
    assert "DeadlineExceeded: reward rank 0 failed in 'score'" in outcome.output
    for event in outcome.events("failure"):
        assert event["role"] == "reward"
        assert "http" in Path(outcome.path / event["stacks"]).read_text()
    assert actors_left() == []
