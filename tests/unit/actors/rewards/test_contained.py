"""A rule that exits, hangs, crashes or exceeds limits fails only its own sample; the rest of the shard is scored."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from actors.rewards.rules import RuleReward
from orchestrator.config.rewards import RuleConfig, RuleLimits
from orchestrator.errors import ConfigError
from tests.deadlines import scaled
from tests.unit.actors.rewards.rollouts import rollout_table

ROOT = Path(__file__).resolve().parents[4]
RULES = "tests.unit.actors.rewards.hostile_rules"
LIMITS = RuleLimits(call_s=3.0, import_s=60.0, memory_gib=0.5, processes=20)


def reward(*functions: str, limits: RuleLimits = LIMITS, total_s: float = 120.0) -> RuleReward:
    return RuleReward([RuleConfig(function=f"{RULES}:{name}") for name in functions], limits, total_s=total_s)


@pytest.fixture(scope="module")
def act() -> Iterator[RuleReward]:
    with reward("act") as source:
        yield source


def sleeping() -> set[str]:
    """The arguments of `sleep` processes."""
    lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    return {line[1] for line in lines if line[:1] == ["sleep"]}


def marked(name: str, value: str) -> list[int]:
    """Other live processes with a value in their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_dead = process.status() == psutil.STATUS_ZOMBIE
            if process.pid != os.getpid() and not is_dead and process.environ().get(name) == value:
                found.append(process.pid)
    return found


def keepers() -> list[int]:
    return [process.pid for process in psutil.Process().children() if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize(
    ("response", "error"),
    [
        ("exit", "rule act: SystemExit"),
        ("exit 0", "rule act: SystemExit: 0"),
        ("interrupt", "rule act: KeyboardInterrupt"),
        ("generator exit", "rule act: GeneratorExit"),
        ("unshowable", "rule act: Unshowable: a Unshowable"),
        ("long", "rule act: ValueError: x{300}$"),
        ("recursion", "rule act: RecursionError"),
        ("os exit", "rule act ended its process with exit code 0"),
        ("abort", "rule act ended its process with SIGABRT"),
        ("segfault", "rule act ended its process with SIGSEGV"),
        ("kill", "rule act ended its process with SIGKILL"),
        ("kill group", "rule act ended its process with SIGKILL"),
        ("kill keeper", "rule act"),
        ("leave one and die", "rule act ended its process with exit code 0"),
        ("close", "rule act ended its process"),
        ("write", "rule act"),
        ("sleep", r"rule act gave no answer within rule_limits\.call_s=3 s"),
        ("stop", r"gave no answer within rule_limits\.call_s"),
        ("loop", r"rule act(: MemoryError| gave no answer within rule_limits\.call_s)"),
        ("GIL", r"gave no answer within rule_limits\.call_s"),
        ("regex", r"gave no answer within rule_limits\.call_s"),
        ("allocate", r"rule act: MemoryError: rule_limits\.memory_gib is exhausted"),
        ("fork bomb", r"rule act had \d+ processes, more than rule_limits\.processes=20"),
        ("scattering fork bomb", r"rule act had \d+ processes, more than rule_limits\.processes=20"),
    ],
)
def test_what_a_rule_does_to_its_process_fails_its_sample_only(act: RuleReward, response: str, error: str) -> None:
    started = time.monotonic()
    first, bad, last = act.scores(rollout_table(["1.5", response, "2.5"]))
    assert (first.value, bad.value, last.value) == (1.5, None, 2.5)
    assert re.search(error, bad.error or ""), bad.error
    assert time.monotonic() - started < scaled(60)


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("print", 1.0),
        ("forked copy", 1.0),
        ("moving", 1.0),
        ("same process", 1.0),
        ("decimal", 0.5),
        ("fraction", 0.25),
        ("minus zero", 0.0),
        *(
            (response, None)
            for response in (
                "400 digits",
                "5000 digits",
                "minus 400 digits",
                "inf",
                "decimal nan",
                "decimal 1e400",
                "fraction of 400 digits",
                "complex",
                "true",
                "part of 400 digits",
                "nested",
                "equal names",
                "many parts",
                "lying parts",
                "sum too large",
            )
        ),
    ],
)
def test_answers_are_finite_numbers_or_failures(act: RuleReward, response: str, value: float | None) -> None:
    scores = act.scores(rollout_table(["1.5", response, "2.5"]))
    assert [score.value for score in scores] == [1.5, value, 2.5]
    assert (scores[1].error is None) == (value is not None)
    assert len(scores[1].error or "") < 500


def test_processes_that_a_rule_leaves_are_bounded_and_end_with_it() -> None:
    with reward("act") as source:
        scores = source.scores(rollout_table(["leave processes", "1", "leave one and die", "2", "leave one"]))
        assert [score.value for score in scores[1::2]] == [1.0, 2.0]
        assert scores[2].value is None
        assert sleeping() & {"3600", "3601", "3602"} == {"3602"}
    assert sleeping() & {"3600", "3601", "3602"} == set()


BOMBS = ("kill keeper", "fork bomb", "scattering fork bomb", "leave processes", "same process", "moving")
SCORING = """
import json, os, sys
from tests.unit.actors.rewards.test_contained import reward
from tests.unit.actors.rewards.rollouts import rollout_table

with reward("act") as source:
    print(json.dumps([source.scores(rollout_table([bomb, "0.5"]))[1].value for bomb in sys.argv[1:]]))
"""


def _without_namespaces() -> None:
    ctypes.CDLL(None).prctl(24, 21, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_SYS_ADMIN: like root in most containers


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities of Linux")
@pytest.mark.parametrize("rights", [None, _without_namespaces])
def test_no_process_outlives_its_rules_with_and_without_a_namespace(rights: Callable[[], None] | None) -> None:
    mark = uuid.uuid4().hex
    ended = subprocess.run(
        [sys.executable, "-c", SCORING, *BOMBS],
        cwd=ROOT,
        env={**os.environ, "BOMB": mark},
        preexec_fn=rights,
        capture_output=True,
        text=True,
        timeout=scaled(240),
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert json.loads(ended.stdout.splitlines()[-1]) == [0.5] * len(BOMBS)
    until = time.monotonic() + scaled(10)
    while (left := marked("BOMB", mark)) and time.monotonic() < until:
        time.sleep(0.1)
    assert left == []


def test_a_sample_is_not_blamed_for_what_an_earlier_one_left() -> None:
    with reward("act") as source:
        scores = source.scores(rollout_table(["die later", "nap", "nap", "leave processes", "nap", "nap"]))
    assert [score.value for score in scores[:3]] == [1.0, 0.5, 0.5]
    assert [score.value for score in scores[4:]] == [0.5, 0.5]


def test_memory_of_all_that_a_rule_starts_counts() -> None:
    with reward("act", limits=LIMITS.model_copy(update={"call_s": scaled(60.0)})) as source:
        started = time.monotonic()
        bad, good = source.scores(rollout_table(["allocate in a child", "2"]))
        # The child has the same limit, or the sum of both exceeds it.
        assert good.value == 2.0
        assert time.monotonic() - started < scaled(50)
        assert bad.value is None or bad.error is None


def test_of_several_rules_the_one_under_way_is_named() -> None:
    with reward("length", "act") as source:
        good, hanging, dying = source.scores(rollout_table(["1", "sleep", "os exit"]))
    assert good.value == 2.0
    assert good.parts == {"length": 1.0, "act": 1.0}
    assert "rule act gave no answer" in (hanging.error or "")
    assert "rule act ended its process" in (dying.error or "")


def test_a_shard_has_a_time_after_which_the_rest_fails() -> None:
    with reward("act", total_s=1.0) as source:
        hanging, late = source.scores(rollout_table(["sleep", "1"]))
        assert "gave no answer within what was left of its shard's time" in (hanging.error or "")
        assert "not scored: the rules took more than 1 s for one shard" in (late.error or "")
        assert source.scores(rollout_table([])) == []


def test_a_rule_that_ends_its_process_between_shards_is_started_again(act: RuleReward) -> None:
    assert act.scores(rollout_table(["die later"]))[0].value == 1.0
    time.sleep(0.5)
    assert act.scores(rollout_table(["2"]))[0].value == 2.0


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("raise SystemExit(0)", r"module 'rule' can't be imported \(SystemExit: 0\)"),
        ("raise KeyboardInterrupt", "can't be imported .KeyboardInterrupt"),
        ("import os; os._exit(0)", "rule f ended its process with exit code 0 while it was imported"),
        ("import ctypes; ctypes.string_at(8)", "ended its process with SIGSEGV while it was imported"),
        ("while True: pass", r"gave no answer within rule_limits\.import_s=2 s while it was imported"),
        ("x = bytearray(1 << 40)", "can't be imported .MemoryError"),
        ("f = 3", "it is a int, not a function"),
        ("def g(*_): return 1", "has no 'f'; it has: g"),
        ("import does_not_exist", "No module named 'does_not_exist'"),
        ("f = ", "can't be imported .SyntaxError"),
    ],
)
def test_a_module_that_does_not_import_is_a_config_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, fault: str
) -> None:
    (tmp_path / "rule.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    limits = LIMITS.model_copy(update={"import_s": 2.0 if "while" in body else 60.0})
    before = keepers()
    with pytest.raises(ConfigError, match=fault):
        RuleReward([RuleConfig(function="rule:f")], limits, total_s=10.0)
    assert keepers() == before


def test_nothing_outlives_a_caller_that_is_killed() -> None:
    code = (
        f"import psutil\nfrom {__name__} import reward, rollout_table\nsource = reward('act')\n"
        "source.scores(rollout_table(['leave one']))\n"
        "print(*[process.pid for process in psutil.Process().children(recursive=True)], flush=True)\n"
        "source.scores(rollout_table(['sleep']))"
    )
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert caller.stdout is not None
    pids = [int(word) for word in caller.stdout.readline().split()]
    assert len(pids) in (3, 4)  # the keeper, the worker and its remains; init of a namespace
    caller.kill()
    caller.wait()
    until = time.monotonic() + scaled(20)
    while (left := [pid for pid in pids if psutil.pid_exists(pid)]) and time.monotonic() < until:
        time.sleep(0.1)
    assert left == []


def test_nothing_outlives_a_keeper_that_is_killed_where_there_is_a_namespace() -> None:
    before = keepers()
    with reward("act") as source:
        source.scores(rollout_table(["leave one"]))
        (keeper,) = set(keepers()) - set(before)
        family = psutil.Process(keeper).children(recursive=True)
        if len(family) < 3:
            pytest.skip("no right to a namespace: PR_SET_PDEATHSIG ends the process of the rules only")
        os.kill(keeper, signal.SIGKILL)
        assert psutil.wait_procs(family, timeout=scaled(20))[1] == []
        assert [score.value for score in source.scores(rollout_table(["2"]))] == [2.0]


def test_a_rule_does_not_see_the_callers_descriptors() -> None:
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    with reward("act") as source:
        source.scores(rollout_table(["write"]))
    os.close(writer)
    assert os.read(reader, 10) == b""
    os.close(reader)
