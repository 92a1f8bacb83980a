"""Rules and endpoints that answer with bombs: families as in bombs.py."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from random import Random
from time import monotonic, sleep

from actors.rewards.http import HttpReward
from actors.rewards.judge import JudgeReward
from actors.rewards.rules import RuleReward
from orchestrator.config.rewards import HttpRewardConfig, JudgeRewardConfig, RuleConfig, RuleLimits
from tests.chaos import hostile_endpoint
from tests.chaos.bombs import Family, Work
from tests.deadlines import scaled
from tests.unit.actors.rewards.hostile_rules import ACTS
from tests.unit.actors.rewards.rollouts import rollout_table
from tests.unit.actors.rewards.test_contained import marked

HTTP_S = 4.0  # for a shard; half of it for each of its two tries
SLACK_S = scaled(10.0)
LIMITS = RuleLimits(call_s=2.0, import_s=60.0, memory_gib=0.25, processes=20)
_MARK = "REWARD_BOMB"
_RULES = "tests.unit.actors.rewards.hostile_rules"
_CHOICE = sorted(set(ACTS) - {"kill keeper"})  # without a PID namespace, its descendants stay


def endpoint(folder: Path, random: Random) -> Work:
    return ask_endpoint, (random.choice(sorted(hostile_endpoint.ANSWERS)), str(random.random()))


def ask_endpoint(kind: str, seed: str) -> None:
    """Raises RewardError for most answers, and AssertionError if it exceeded the time limit."""
    command = [sys.executable, str(Path(hostile_endpoint.__file__)), kind, seed]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}/score"
        source = source_of(url, is_judge=float(seed) < 0.5)
        started = monotonic()
        try:
            scores = source.scores(rollout_table(["a", "b"]))
            assert len(scores) == 2
        finally:
            took = monotonic() - started
            server.kill()
            assert took < HTTP_S + SLACK_S, f"{kind}, {seed}: {took:.1f} s"


def source_of(url: str, *, is_judge: bool) -> HttpReward | JudgeReward:
    if is_judge:
        judge = JudgeRewardConfig(url=url, model="m", timeout_s=HTTP_S / 2, retries=1)
        return JudgeReward(judge, total_s=HTTP_S, first_pause_s=0.01)
    reward = HttpRewardConfig(url=url, timeout_s=HTTP_S / 2, retries=1)
    return HttpReward(reward, total_s=HTTP_S, first_pause_s=0.01)


def rules(folder: Path, random: Random) -> Work:
    return ask_rules, (tuple(random.choice(_CHOICE) for _ in range(random.choice((1, 3, 5)))),)


def ask_rules(acts: tuple[str, ...]) -> None:
    """Raises AssertionError if a good sample is not scored or a process is left."""
    mark = uuid.uuid4().hex
    os.environ[_MARK] = mark
    responses = [response for act in acts for response in (act, "0.25")]
    with RuleReward([RuleConfig(function=f"{_RULES}:act")], LIMITS, total_s=scaled(50.0)) as source:
        scores = source.scores(rollout_table(responses))
    assert [score.value for score in scores[1::2]] == [0.25] * len(acts), [score.error for score in scores]
    assert all((score.value is None) == (score.error is not None) for score in scores)
    until = monotonic() + SLACK_S
    while (left := marked(_MARK, mark)) and monotonic() < until:
        sleep(0.1)
    assert left == [], f"{acts} left {left}"


FAMILIES: Mapping[str, tuple[Family, int]] = {"endpoints": (endpoint, 60), "rules": (rules, 40)}
