from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from jobs.why.command import main, sections
from jobs.why.explain import Explanation, duration, explain
from jobs.why.reader import read_facts
from tests.deadlines import scaled
from tests.unit.jobs.run_folder import NUM_STEPS, write_run

NOW = 1.7e9
CONFIG = "stages: [reward_model, rl]\nrl: {steps: 12}\n"
ENGINE_FROZE = {
    "role": "rollout",
    "rank": 1,
    "operation": "generate",
    "error": "DeadlineExceeded",
    "category": "infrastructure",
    "cause": "rollout rank 1 failed in 'generate': no answer within its deadline of 60 s",
    "node": "10.0.0.3",
    "pid": 4711,
    "exit": "stopped (SIGSTOP)",
    "log": ["INFO engine [core]: 3 running", "INFO engine: 4 running"],
    "stacks": "stacks/001-rollout.txt",
    "step": 3,
}
POLICY_DIED = {**ENGINE_FROZE, "role": "policy", "rank": 0, "operation": "learn", "error": "RoleDied", "step": 5}


class Run:
    """A run folder, written as by a run; each event is one second after the previous one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "attempts").mkdir(parents=True)
        (folder / "config.yaml").write_text(CONFIG)
        self._time = NOW - 1000.0

    def attempt(self, number: int) -> None:
        path = self.folder / "attempts" / f"{number:03d}"
        path.touch()
        os.utime(path, (self._time, self._time))

    def event(self, kind: str, attempt: int = 1, stage: str = "rl", **fields: Any) -> None:
        self._time += 1.0
        line = {"time": self._time, "attempt": attempt, "stage": stage, "kind": kind, **fields}
        with (self.folder / "events.jsonl").open("a") as stream:
            stream.write(json.dumps(line) + "\n")

    def begin(self, attempt: int = 1) -> None:
        self.attempt(attempt)
        if attempt == 1:
            self.event("stage_started", stage="reward_model")
            self.event("stage_finished", stage="reward_model")
        self.event("stage_started", attempt)

    def answered(self, failure: dict[str, Any], action: str, *, seconds: float = 42.4, step: int) -> None:
        self.event("failure", **failure)
        self.event("recovery", action=action, roles=[failure["role"]], used=1, budget=5)
        self.event("recovered", action=action, seconds=seconds, step=step, relearned=2)

    def steps(self, committed: int, learned: int, checkpoint: int | None) -> None:
        for step in range(committed):
            (self.folder / "log" / f"step-{step:06d}").mkdir(parents=True)
            (self.folder / "log" / f"step-{step:06d}" / "manifest.json").touch()
        lines = [{"stage": "rl", "kind": "step", "step": step, "metrics": {}} for step in range(learned)]
        (self.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if checkpoint is not None:
            (self.folder / "checkpoints" / f"step-{checkpoint:06d}").mkdir(parents=True)
            (self.folder / "checkpoints" / f"step-{checkpoint:06d}" / "COMPLETE").touch()
            (self.folder / "checkpoints" / f"step-{checkpoint + 1:06d}").mkdir()

    def beat(self, age: float = 3.0, attempt: int = 1, **content: Any) -> None:
        head = {"time": NOW - age, "attempt": attempt, "pid": 99, "host": "elsewhere", "stage": "rl", "step": 7}
        rest = {"phases": {"learn": 12.0}, "waiting": [], "paused": None, "ended": None}
        (self.folder / "heartbeat.json").write_text(json.dumps({**head, **rest, **content}))

    def explain(self, now: float = NOW) -> Explanation:
        facts = read_facts(self.folder, now)
        assert facts is not None
        return explain(facts)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "demo-1")


def text(explained: Explanation, folder: Path = Path("runs/demo-1")) -> str:
    return "\n".join("\n".join([heading, *lines]) for heading, lines in sections(explained, folder))


def ask(folder: Path, *options: str) -> Result:
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, [str(folder), *options])


def test_a_quiet_finished_run_has_nothing_to_tell(tmp_path):
    folder = write_run(tmp_path / "quiet")
    result = ask(folder)
    assert result.exit_code == 0
    assert "quiet: finished" in result.stdout
    assert "nothing failed" in result.stdout
    assert f"last step learned: {NUM_STEPS - 1}" in result.stdout
    assert "rlhf run" not in result.stdout


def test_a_live_run_tells_what_it_waits_for_how_long_and_against_which_deadline(run):
    run.begin()
    run.steps(committed=8, learned=7, checkpoint=5)
    call = {"role": "policy", "rank": 0, "operation": "learn", "seconds": 12.0, "deadline_s": 3600.0}
    run.beat(waiting=[call, {**call, "rank": 1, "seconds": 72.0}])
    explained = run.explain()
    assert explained.state == "running"
    assert explained.first_failure is None
    assert list(explained.now) == [
        "alive: process 99 on elsewhere, last heartbeat 3 s ago",
        "rl, step 7",
        "phases: learn for 12 s",
        "waits for policy rank 1: learn, for 1 min 12 s, deadline 1 h 0 min",
        "waits for policy rank 0: learn, for 12 s, deadline 1 h 0 min",
    ]
    standing = explained.standing
    assert (standing.num_committed, standing.last_learned, standing.last_checkpoint) == (8, 6, 5)
    assert standing.stages == {"reward_model": "finished", "rl": "begun"}


def test_a_wait_for_capacity_is_told_while_nothing_came_after_it(run):
    run.begin()
    run.event("waiting", what="waiting up to 300 s for nodes to join: 2 CPUs short")
    run.beat()
    assert any("nodes to join: 2 CPUs short, for " in line for line in run.explain().now)
    run.event("placed", plan=[])
    assert not any("CPUs" in line for line in run.explain().now)


def test_a_frozen_engine_that_was_replaced_is_named_with_its_evidence(run):
    run.begin()
    run.answered(ENGINE_FROZE, "restart actor", step=3)
    run.beat()
    explained = run.explain()
    failure = explained.first_failure
    assert explained.state == "running"
    assert failure is not None and failure.is_answered
    assert (failure.role, failure.rank, failure.node, failure.pid) == ("rollout", 1, "10.0.0.3", 4711)
    shown = text(explained)
    for expected in (
        "rollout rank 1: DeadlineExceeded in generate, step 3",
        "no answer within its deadline of 60 s",
        "exit: stopped (SIGSTOP)",
        "stacks: runs/demo-1/stacks/001-rollout.txt",
        "| INFO engine [core]: 3 running",
        "restart actor: rollout (1 of 5)",
        "recovered: restart actor took 42 s, step 3, learned again: 2",
    ):
        assert expected in shown


def test_the_first_failure_is_that_which_nothing_was_recovered_from(run):
    run.begin()
    run.answered(ENGINE_FROZE, "restart actor", step=3)
    run.event("failure", **POLICY_DIED)
    run.event("recovery", action="restart learners", roles=["policy"], used=2, budget=2)
    run.event("failure", **{**POLICY_DIED, "role": "critic"})
    run.event("gave_up", reason="failures.infrastructure=2 of 100 steps are used up")
    run.event("stage_failed", error="RoleDied: critic rank 0 failed in 'load': gone")
    run.beat(age=900.0, ended="RoleDied: critic rank 0 failed in 'load': gone")
    explained = run.explain()
    assert explained.state == "failed"
    assert explained.first_failure is not None
    assert explained.first_failure.role == "policy"
    assert not explained.first_failure.is_answered
    assert "failed: attempt 1 ended with: failures.infrastructure=2 of 100 steps are used up" in explained.now


def test_a_learner_that_died_and_was_replaced_leaves_the_run_alive(run):
    run.begin()
    run.answered(POLICY_DIED, "restart learners", seconds=90.0, step=5)
    run.beat()
    explained = run.explain()
    assert explained.state == "running"
    assert "restart learners took 1 min 30 s, step 5, learned again: 2" in text(explained)


def test_an_error_of_the_program_is_to_be_mended_before_going_on(run):
    run.begin()
    run.event("failure", **{**POLICY_DIED, "error": "RoleError", "category": "programming"})
    run.event("stage_failed", error="RoleError: policy rank 0 failed in 'learn': KeyError")
    assert "a programming error will recur: correct its cause first" in run.explain().now


def test_a_failure_that_only_the_end_of_a_stage_tells_of_is_taken_apart(run):
    run.begin()
    run.event("stage_failed", error="RoleDied: policy rank 1 failed in 'learn': its process\nis gone")
    failure = run.explain().first_failure
    assert failure is not None
    assert (failure.role, failure.rank, failure.operation) == ("policy", 1, "learn")
    assert (failure.error, failure.cause) == ("RoleDied", "its process is gone")


def test_a_pause_by_a_guard_says_why_and_how_to_resume(run):
    run.begin()
    guard = {"guard": "max_kl", "step": 7, "metric": "kl/per_response", "value": 31.25, "bound": 20.0}
    run.event("guard", **guard, action="warn")
    run.event("guard", **guard, action="pause")
    (run.folder / "PAUSED").write_text("kl/per_response is 31.2\n")
    run.beat()
    explained = run.explain()
    assert explained.state == "paused"
    assert explained.first_failure is not None
    assert explained.first_failure.cause == "kl/per_response is 31.25, its bound 20; action: pause"
    assert "paused: kl/per_response is 31.2" in explained.now
    assert any(f"rm {run.folder}/PAUSED" in line for line in explained.now)
    (run.folder / "PAUSED").unlink()
    run.event("pause_ended", step=7)
    explained = run.explain()
    assert explained.state == "running"
    assert explained.first_failure is not None and explained.first_failure.is_answered


def test_a_wait_for_people_is_a_state_of_its_own_with_the_ways_to_end_it(run):
    run.begin()
    run.event("people_asked", batch="demo-1/people", items=40, judgements=48)
    people = {
        "batch": "demo-1/people",
        "store": "runs/demo 1/labels.db",
        "items": 40,
        "judgements": 11,
        "missing": 37,
        "since": NOW - 18720.0,
        "until": None,
        "page": "http://127.0.0.1:8700",
        "problem": None,
    }
    run.beat(stage="people", step=None, phases={}, people=people)
    explained = run.explain()
    assert explained.state == "waiting" and explained.first_failure is None
    assert list(explained.now) == [
        "alive: process 99 on elsewhere, last heartbeat 3 s ago",
        "people, step none yet",
        "waits for people: 37 of 48 judgements of demo-1/people are missing, for 5 h 12 min",
        "page: http://127.0.0.1:8700; a link: rlhf label invite NAME --store 'runs/demo 1/labels.db' --address "
        "http://127.0.0.1:8700",
        "to continue with what there is: rlhf label finish demo-1/people --store 'runs/demo 1/labels.db'",
    ]
    assert "asked people for 48 judgements of 40 items" in text(explained)
    assert ask(run.folder).exit_code == 1, "the heartbeat is old by now"
    run.beat(people={**people, "missing": None, "until": NOW + 60.0, "page": None, "problem": "it is away"})
    now = "\n".join(run.explain().now)
    assert "judgements of demo-1/people are missing, for 5 h 12 min, until " in now and "page" not in now
    assert "the judgements can't be counted now: it is away" in now
    run.beat(people={"batch": ["x"], "missing": "many", "since": -1e300, "until": True})
    assert run.explain().state == "waiting"
    run.beat(age=7000.0, people=people)
    assert run.explain().state == "killed"
    run.event("people_judged", batch="demo-1/people", judgements=48, judged=40, reason="all that were asked for")
    assert "people gave 48 judgements of 40 items; all that were asked for" in text(run.explain())


def test_a_guard_that_stopped_the_run_is_the_first_failure(run):
    run.begin()
    run.event("guard", guard="max_kl", step=7, metric="kl/per_response", value=None, bound=20.0, action="stop")
    run.event("stage_failed", error="GuardTripped: step 7: KL")
    run.beat(age=500.0, ended="GuardTripped: step 7: KL")
    explained = run.explain()
    assert explained.state == "failed"
    assert explained.first_failure is not None
    assert explained.first_failure.role == "guard max_kl"
    assert explained.first_failure.cause == "kl/per_response is not finite, its bound 20; action: stop"
    assert explained.now[0] == "failed: attempt 1 ended with: GuardTripped: step 7: KL"


def test_a_killed_driver_is_told_by_its_last_heartbeat_with_the_command_to_go_on(run):
    run.begin()
    run.steps(committed=8, learned=7, checkpoint=5)
    call = {"role": "critic", "rank": 0, "operation": "learn", "seconds": 12.0, "deadline_s": 600.0}
    run.beat(age=7500.0, waiting=[call])
    explained = run.explain()
    assert explained.state == "killed"
    failure = explained.first_failure
    assert failure is not None
    assert (failure.role, failure.node, failure.pid, failure.step) == ("driver", "elsewhere", 99, 7)
    assert "SIGKILL" in failure.cause
    shown = text(explained)
    assert "attempt 1 (process 99 on elsewhere) left no end; last heartbeat 2 h 5 min ago:" in shown
    assert "  waits for critic rank 0: learn, for 12 s, deadline 10 min 0 s" in explained.now
    assert f"rlhf run --config {run.folder}/config.yaml run.id=demo-1 run.root={run.folder.parent}" in shown
    assert "begins with checkpoint 5, learns steps 5 to 7 again from the log, samples from step 8 on" in shown


def test_an_attempt_that_never_beat_is_starting_and_later_dead(run):
    run.attempt(1)
    assert run.explain(now=NOW - 990.0).state == "starting"
    explained = run.explain()
    assert explained.state == "killed"
    assert explained.now[0] == "dead: attempt 1 left no end and no heartbeat; its last sign of life is 16 min 40 s old"


def test_a_stop_that_was_asked_for_is_no_failure(run):
    run.begin()
    run.event("stop_requested", saved="step-000005", step=7)
    run.beat()
    assert "it was asked to stop: it saves and ends" in run.explain().now
    run.event("stage_failed", error="CancelledError: ")
    run.beat(age=60.0, ended="stopped")
    explained = run.explain()
    assert explained.state == "stopped"
    assert explained.first_failure is None
    assert "asked to stop, step 7; last checkpoint: step-000005" in text(explained)


def test_a_resumed_run_tells_of_earlier_attempts_in_a_line_each(run):
    run.begin(1)
    run.event("failure", **POLICY_DIED)
    run.event("stage_failed", error="RoleDied: policy rank 0 failed in 'learn': gone")
    run.begin(2)
    run.begin(3)
    run.event("restored", 3, table={"checkpoint": "step 5", "steps learned again": 2})
    run.beat(attempt=3)
    explained = run.explain()
    assert (explained.state, explained.first_failure) == ("running", None)
    first, second = explained.earlier
    assert first.startswith("attempt 1, from ")
    assert ": failed; first: policy rank 0: RoleDied in learn, step 5; end: RoleDied: policy rank 0" in first
    assert "attempt 2" in second and "killed; first: driver: killed" in second
    assert "nothing failed in attempt 3" in text(explained)
    assert "restored: checkpoint step 5; steps learned again 2" in text(explained)


def test_a_finished_run_that_is_resumed_counts_as_begun_until_it_ends_again(run):
    run.begin(1)
    run.event("stage_finished")
    run.beat(age=800.0, ended="finished")
    assert run.explain().state == "finished"
    run.begin(2)
    run.beat(attempt=2, age=100.0)
    assert run.explain().state == "killed"


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        yield process
        process.kill()


def wait_for_status(pid: int, letter: str) -> None:
    deadline = time.monotonic() + scaled(10.0)
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != letter:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_on_its_own_host_a_run_is_judged_by_its_process(run, sleeper):
    run.begin()
    now = time.time()
    mine = {"pid": sleeper.pid, "host": socket.gethostname(), "time": now}
    run.beat(**mine)
    assert run.explain(now + 1.0).state == "running"
    hanging = run.explain(now + 60.0)
    assert hanging.state == "frozen"
    assert f"py-spy dump --pid {sleeper.pid}" in hanging.now[0]
    sleeper.send_signal(signal.SIGSTOP)
    wait_for_status(sleeper.pid, "T")
    stopped = run.explain(now + 1.0)
    assert stopped.state == "frozen"
    assert f"kill -CONT {sleeper.pid}" in stopped.now[0]
    run.beat(**{**mine, "time": now - 3600.0})
    assert run.explain(now + 1.0).state == "killed", "the process id was reused"
    run.beat(**mine)
    sleeper.kill()
    wait_for_status(sleeper.pid, "Z")
    assert run.explain(now + 1.0).state == "killed"


def test_torn_and_damaged_files_are_noted_and_the_rest_is_told(run):
    run.begin()
    run.event("failure", **ENGINE_FROZE)
    with (run.folder / "events.jsonl").open("ab") as stream:
        stream.write(b'\xff\x00garbage\n[1]\n{"time": "noon", "attempt": 1}\n{"time": 1, "attem')
    (run.folder / "metrics.jsonl").write_text("{}\nnonsense\n")
    (run.folder / "heartbeat.json").write_text('{"time": ')
    (run.folder / "config.yaml").write_text("a: [")
    (run.folder / "attempts" / "notes.txt").touch()
    explained = run.explain()
    assert explained.first_failure is not None
    assert explained.first_failure.role == "rollout"
    assert [note.split()[0] for note in explained.notes] == [
        "config.yaml",
        "events.jsonl:",
        "metrics.jsonl:",
        "heartbeat.json",
    ]
    assert explained.notes[1] == "events.jsonl: 2 damaged lines are left out."
    assert ask(run.folder).exit_code == 1


def test_every_part_may_be_missing_or_of_the_wrong_kind(run):
    run.begin()
    for name in ("config.yaml", "events.jsonl"):
        (run.folder / name).unlink()
    for name in ("events.jsonl", "metrics.jsonl", "heartbeat.json", "config.yaml", "PAUSED"):
        (run.folder / name).mkdir()
    for name in ("log", "checkpoints", "stacks"):
        (run.folder / name).write_text("a file")
    assert run.explain().state == "killed"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
KINDS = st.sampled_from(
    ["failure", "recovery", "recovered", "gave_up", "restored", "guard", "stop_requested", "waiting", "stage_failed"]
)
FIELDS = st.sampled_from(["role", "rank", "error", "log", "table", "roles", "seconds", "step", "action", "node", "pid"])
EVENTS = st.builds(
    lambda head, fields: {**fields, **head},
    st.fixed_dictionaries({"time": st.floats(0, 2e9) | VALUES, "attempt": st.integers(0, 3) | VALUES, "kind": KINDS}),
    st.dictionaries(FIELDS, VALUES, max_size=6),
)
BEATS = st.dictionaries(
    st.sampled_from(["phases", "waiting", "paused", "ended", "pid", "host", "stage", "step"]), VALUES, max_size=8
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=st.lists(EVENTS, max_size=5), beat=BEATS)
def test_whatever_the_files_hold_it_answers(tmp_path, events, beat):
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (tmp_path / "heartbeat.json").write_text(json.dumps({"time": NOW, "attempt": 1, **beat}))
    facts = read_facts(tmp_path, NOW)
    assert facts is not None
    assert "Where it stands" in text(explain(facts))


@pytest.mark.parametrize("name", [".", "nowhere", "file"])
def test_where_there_is_no_run_it_says_so(tmp_path, name):
    (tmp_path / "file").touch()
    result = ask(tmp_path / name)
    assert result.exit_code == 2
    assert "holds no run" in result.stderr


def test_json_holds_the_same_facts(run):
    run.begin()
    run.event("failure", **ENGINE_FROZE)
    run.event("stage_failed", error="DeadlineExceeded: ...")
    result = ask(run.folder, "--json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert told["state"] == "failed"
    assert told["first_failure"]["node"] == "10.0.0.3"
    assert told["standing"]["stages"]["rl"] == "failed"


def test_it_answers_within_two_seconds_and_loads_nothing_heavy(run):
    run.begin()
    run.steps(committed=200, learned=200, checkpoint=190)
    code = (
        "import sys, jobs.why.command\n"
        "heavy = {'ray', 'torch', 'transformers', 'vllm', 'deepspeed'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    started = time.process_time(), time.monotonic()
    assert run.explain().standing.num_committed == 200
    assert time.process_time() - started[0] < scaled(1.0)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(-1.0, "0 s"), (59.4, "59 s"), (60.0, "1 min 0 s"), (3599.0, "59 min 59 s"), (7500.0, "2 h 5 min")],
)
def test_durations_are_told_in_units_that_fit(seconds, expected):
    assert duration(seconds) == expected


@pytest.mark.parametrize(
    ("ends", "ended", "state", "cause"),
    [
        (["stage_finished"], "finished", "finished", None),
        ([], None, "killed", "left no end"),
        (["stage_failed"], "failed", "failed", "Loss is not finite"),
    ],
)
def test_the_end_of_a_run_without_rollouts(
    run: Run, ends: list[str], ended: str | None, state: str, cause: str | None
) -> None:
    (run.folder / "config.yaml").write_text("stages: [sft, {name: dpo, kind: preference}]\n")
    run.attempt(1)
    for stage in ("sft", "dpo"):
        run.event("stage_started", stage=stage, stages=["sft", "dpo"])
        for kind in ["stage_finished"] if stage == "sft" else ends:
            run.event(kind, stage=stage, error="NonFiniteError: Loss is not finite")
    run.beat(age=3000.0, stage="dpo", step=12, pid=2**22 + 1, host=socket.gethostname(), ended=ended)
    explained = run.explain()
    assert explained.state == state
    last = {"finished": "finished", "killed": "begun", "failed": "failed"}[state]
    assert explained.standing.stages == {"sft": "finished", "dpo": last} and explained.standing.logged is None
    failure = explained.first_failure
    assert (failure is None) is (cause is None)
    if failure is not None:
        assert cause is not None and cause in failure.cause
        assert failure.operation == "stage dpo" and failure.step == (12 if state == "killed" else None)
        assert any("to continue: rlhf run --config" in line for line in explained.now)
    shown = text(explained)
    assert "sft finished" in shown and "steps committed" not in shown
