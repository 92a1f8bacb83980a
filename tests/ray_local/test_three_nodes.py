"""The main job on a three-node cluster with token authentication, through `ray job submit`."""

from __future__ import annotations

import os
import re
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from orchestrator.watching.telemetry import read_lines
from tests.deadlines import of_a_run, scaled
from tests.ray_local.net import DASHBOARD, SUBNET, Cluster, three_hosts, why_not
from tests.tiny import tiny_llama

REASON = why_not()
pytestmark = [
    pytest.mark.ray,
    pytest.mark.heavy,
    pytest.mark.slow,
    pytest.mark.skipif(REASON is not None, reason=f"three nodes on one machine: {REASON}"),
    pytest.mark.timeout(scaled(600)),
]

ROOT = Path(__file__).resolve().parents[2]
JOB_S = scaled(400.0)
ROLE_OF_CLASS = {
    "RolloutWorker": "rollout",
    "PublishingPolicy": "policy",
    "CriticWorker": "critic",
    "ReferenceWorker": "reference",
    "RewardWorker": "reward",
    "RecorderWorker": "recorder",
}


def submit(cluster: Cluster, *overrides: str) -> tuple[int, str]:
    """Exit code and output of the documented command."""
    done = cluster.run(
        *("ray", "job", "submit", "--address", DASHBOARD, "--working-dir", ".", "--"),
        *("python", "-m", "jobs", "run", "--config", "jobs/configs/ppo.yaml", *overrides),
        cwd=ROOT,
        timeout_s=JOB_S,
    )
    return done.returncode, done.stdout


def tiny_overrides(folder: Path) -> list[str]:
    settings = {
        "stages": "[rl]",
        "run.id": "three",
        **{f"deadlines.{name}": seconds for name, seconds in of_a_run().items()},
        "model.path": tiny_llama(folder / "model"),
        "prompts.limit": 60,
        "prompts.max_prompt_tokens": 88,
        "reward.name": "rules",
        "reward.rules": "[{function: 'actors.rewards.rules:length_target'}]",
        "rollout.max_new_tokens": 16,
        "rollout.samples_per_shard": 8,
        "rollout.kv_cache_gib": 0.1,
        "rl.steps": 2,
        "rl.prompts_per_step": 16,
        "evaluation.prompts": 4,
    }
    return [f"{key}={value}" for key, value in settings.items()]


def planned(run: Path) -> dict[str, list[str]]:
    """Addresses by role, from the printed plan."""
    (placed,) = (event for event in read_lines(run / "events.jsonl") if event["kind"] == "placed")
    places = defaultdict(list)
    for line in placed["plan"]:
        role, address = re.fullmatch(rf"(\w+) \d+: ({re.escape(SUBNET)}\.\d), .*", line).groups()
        places[role].append(address)
    return places


def found(cluster: Cluster) -> dict[str, list[str]]:
    """Addresses by role, where its actors ran according to Ray."""
    address_of_node = {node["node_id"]: node["node_ip"] for node in cluster.listed("nodes")}
    places = defaultdict(list)
    for actor in cluster.listed("actors"):
        if actor["class_name"] in ROLE_OF_CLASS:
            places[ROLE_OF_CLASS[actor["class_name"]]].append(address_of_node[actor["node_id"]])
    return places


def test_hosts_are_gone_after_a_failure() -> None:
    def failing() -> None:
        with three_hosts():
            assert len(own_namespaces()) == 4
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        failing()
    assert own_namespaces() == []


def own_namespaces() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
    return [line for line in listed.splitlines() if line.startswith(f"rlhf{os.getpid()}-")]


def test_a_job_without_the_token_is_refused(cluster: Cluster) -> None:
    answer = cluster.fetch("/api/jobs/", with_token=False)
    assert answer.returncode and "401" in answer.stderr
    assert cluster.fetch("/api/jobs/").returncode == 0


def test_the_job_runs_with_its_roles_where_the_plan_says(cluster: Cluster, folder: Path) -> None:
    code, output = submit(cluster, *tiny_overrides(folder))
    assert code == 0, output[-6000:]
    run = folder / "home" / "rlhf" / "runs" / "three"
    steps = [line for line in read_lines(run / "metrics.jsonl") if line["kind"] == "step"]
    assert [line["step"] for line in steps] == [0, 1]
    assert steps[-1]["metrics"]["publish/tensors_verified"] > 10
    assert (run / "export" / "model.safetensors").exists()
    plan = planned(run)
    assert set(plan) == set(ROLE_OF_CLASS.values())
    assert {address for addresses in plan.values() for address in addresses} == {f"{SUBNET}.{i}" for i in (1, 2, 3)}
    assert found(cluster) == plan
    assert all(f"{role} 0: {addresses[0]}," in output for role, addresses in plan.items()), "the plan was not printed"
    assert not [actor for actor in cluster.listed("actors") if actor["state"] == "ALIVE"], "actors outlived their job"


def test_a_job_with_a_bad_key_fails_and_says_why(cluster: Cluster) -> None:
    code, output = submit(cluster, "rl.stepz=2")
    assert code != 0
    assert "did you mean 'rl.steps'?" in output
    assert "exit code: 2" in output or "exit code 2" in output


def test_our_own_submit_ends_with_the_jobs_exit_code(cluster: Cluster) -> None:
    done = cluster.run(
        *("python", "-m", "jobs", "submit", "--address", DASHBOARD, "--config", "jobs/configs/quickstart.yaml"),
        *("prompts.path=/nowhere/prompts.jsonl", "stages=[sample,preferences]"),
        cwd=ROOT,
        timeout_s=JOB_S,
    )
    assert done.returncode == 2, done.stdout
    assert "/nowhere/prompts.jsonl" in done.stdout
