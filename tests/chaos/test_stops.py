"""Runs that are stopped, continued, or left without an answer. `make chaos` runs them; unit tests cover their parts."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from orchestrator.guards import PAUSED_FILE
from tests.chaos.conftest import assert_as_quiet, blow
from tests.chaos.matrix import Field, Outcome, actors_left
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


def test_a_run_of_three_steps_and_then_of_all_ends_as_one_of_all(here: Field, quiet: Outcome) -> None:
    assert here.run("halves", (), "ppo.steps=3").code == 0
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
    answers = threading.Semaphore(4)  # for the checks before the run and the first samples

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
            "reward.kind=http",
            "reward.rules=[]",
            f"reward.http={{url: '{url}', timeout_s: 500}}",
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
