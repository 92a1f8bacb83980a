"""What dies, freezes or is stopped leaves no trace in the result. `make chaos` has the whole matrix, this its core."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.chaos.matrix import STEPS, Blow, Field, Outcome, actors_left, one_node

pytestmark = [pytest.mark.ray, pytest.mark.heavy, pytest.mark.slow, pytest.mark.timeout(900)]

LATE_S = 10.0  # a missed deadline is told within so many seconds


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    with one_node(tmp_path_factory.mktemp("chaos")) as field:
        yield field


@pytest.fixture(scope="module")
def quiet(here: Field) -> Outcome:
    """A run that nothing disturbs, on one engine; all others have two."""
    outcome = here.run("quiet", (), "rollout.engines=1")
    assert outcome.code == 0, outcome.output
    return outcome


def blow(role: str, step: int, phase: str, kind: str = "KILL") -> Blow:
    return {"role": role, "step": step, "phase": phase, "signal": kind, "delay_s": 0.05}


def assert_as_quiet(outcome: Outcome, quiet: Outcome) -> None:
    assert outcome.code == 0, outcome.output
    assert outcome.bits() == quiet.bits()
    assert outcome.steps() == list(range(STEPS))
    assert outcome.tokens() == quiet.tokens(), "something that was committed was sampled again, or lost"
    assert actors_left() == []


def test_a_run_in_which_each_kind_of_process_was_killed_ends_as_a_quiet_one(here: Field, quiet: Outcome) -> None:
    plan = [
        blow("rollout", 0, "generate"),
        blow("reference", 1, "score"),
        blow("reward", 2, "generate"),
        blow("policy", 3, "learn"),
        blow("critic", 4, "publish"),
        blow("driver", 5, "save"),
    ]
    outcome = here.run("killed", plan)
    assert outcome.struck == len(plan)
    assert_as_quiet(outcome, quiet)
    actions = [event["action"] for event in outcome.events("recovered")]
    assert actions == ["restart actor"] * 3 + ["restart learners"] * 2
    assert len(list((outcome.path / "attempts").iterdir())) == 2
    # A checkpoint every second step, and five restarts of learners or driver at most one step away from one.
    assert outcome.relearned() <= 3


def test_what_freezes_is_found_named_and_replaced(here: Field, quiet: Outcome) -> None:
    plan = [blow("rollout", 1, "generate", "STOP"), blow("policy", 2, "learn", "STOP") | {"rank": 1}]
    deadlines = {"generate": 15.0, "learn": 20.0}
    overrides = [f"deadlines.{name}_s={seconds}" for name, seconds in deadlines.items()]
    outcome = here.run("frozen", plan, *overrides)
    assert_as_quiet(outcome, quiet)
    failures = outcome.events("failure")
    assert [event["role"] for event in failures] == ["rollout", "policy"]
    for index, (event, deadline_s) in enumerate(zip(failures, deadlines.values(), strict=True)):
        pid, struck_at = (here.folder / f"frozen.{index}").read_text().split()
        assert event["exit"] == "stopped (SIGSTOP)"
        assert event["pid"] == int(pid), "the wrong process is blamed"
        assert event["error"] == "DeadlineExceeded"
        assert event["time"] - float(struck_at) < deadline_s + LATE_S
        assert "Thread" in (outcome.path / event["stacks"]).read_text()


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
    assert outcome.code == 1, outcome.output
    assert "DeadlineExceeded: reward rank 0 failed in 'score'" in outcome.output
    for event in outcome.events("failure"):
        assert event["role"] == "reward"
        assert "http" in Path(outcome.path / event["stacks"]).read_text()
    assert actors_left() == []
