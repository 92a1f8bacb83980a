"""Runs with an environment and real vLLM, DeepSpeed and Ray: a killed run ends with the bits of a whole one; episodes
that fail are dropped and counted, or stop the run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from jobs.stages.work.replay import fingerprint
from orchestrator.watching.telemetry import read_lines
from tests.deadlines import of_a_run
from tests.integration.test_run import RUN_S, Launcher, finish, wait_until
from tests.local_ray import local_ray
from tests.tiny import tiny_llama

pytestmark = [pytest.mark.ray, pytest.mark.heavy, pytest.mark.slow]

STEPS = 2
ENVIRONMENTS = "tests.integration.environments"


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    folder = tmp_path_factory.mktemp("run")
    rows = [{"question": f"What is {n} + 1?", "answer": str(n + 1), "number": n} for n in range(12)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {
        "stages": ["rl"],
        "run": {"root": str(folder / "runs")},
        "model": {"path": str(tiny_llama(folder / "model")), "max_length": 256, "dtype": "float32"},
        "prompts": {"path": str(folder / "sums.jsonl"), "format": "question", "max_prompt_tokens": 100,
                    "held_out_fraction": 0.0, "reward_model_fraction": 0.0},
        "environment": {"name": f"{ENVIRONMENTS}:Counting", "max_turns": 3},
        "reward": {"name": "environment"},
        "policy": {"learning_rate": 1e-3},
        "rollout": {"engine": "vllm", "max_new_tokens": 12, "samples_per_shard": 8, "kv_cache_gib": 0.1},
        "rl": {"steps": STEPS, "prompts_per_step": 4, "samples_per_prompt": 4},
        "algorithm": {"name": "grpo"},
        "checkpoints": {"every_steps": 1, "export": False},
        "evaluation": {"prompts": 0},
        "telemetry": {"prometheus_port": None, "tensorboard": False},
        "deadlines": of_a_run(),
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    with local_ray("en") as address:
        yield Launcher(folder, address)


def logged(folder: Path) -> list[dict[str, Any]]:
    files = sorted((folder / "log").glob("step-*/*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def killed_and_whole(launcher: Launcher, name: str, *keys: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and metrics of a run that learned, and that ends with the same bits if it is killed and continued."""
    finish(launcher.ppo(name, *keys))
    whole, killed = launcher.run_folder(name), launcher.run_folder(f"killed-{name}")
    process = launcher.ppo(f"killed-{name}", *keys)
    wait_until(process, (killed / "log" / "step-000000" / "manifest.json").exists)
    process.kill()
    process.communicate()
    finish(launcher.ppo(f"killed-{name}", *keys))
    rows = logged(whole)
    assert rows == logged(killed) and len(rows) == 4 * 4 * STEPS
    last = f"checkpoints/step-{STEPS:06d}"
    assert fingerprint(whole / last, "policy") == fingerprint(killed / last, "policy")
    for row in rows:
        episode = json.loads(row["meta"])["episode"]
        assert episode["turns"] == 3 and row["reward"] == pytest.approx(episode["reward"])
    metrics = [line["metrics"] for line in read_lines(whole / "metrics.jsonl") if line["kind"] == "step"]
    assert metrics[0]["kl/per_token_k3"] == 0.0 < metrics[1]["kl/per_token_k3"], "the policy never learned"
    return rows, metrics


@pytest.mark.variant  # the next test kills a run with an agent, which is an environment
def test_a_killed_run_ends_with_the_bits_of_a_whole_one(launcher: Launcher) -> None:
    rows, metrics = killed_and_whole(launcher, "whole")
    for row in rows:
        episode = json.loads(row["meta"])["episode"]
        assert " = " in "".join(text for learned, text in episode["spans"] if not learned)
        assert not all(row["learn"])
        assert not any(value for value, learn in zip(row["advantages"], row["learn"], strict=True) if not learn)
    assert metrics[0]["engine/mismatch"] < 1e-3


def test_a_killed_run_with_an_agent_ends_with_the_bits_of_a_whole_one(launcher: Launcher) -> None:
    """The agent rewrites its history, so every row has a second segment."""
    keys = (f"environment.name={ENVIRONMENTS}:asking", "environment.step_s=60")
    rows, metrics = killed_and_whole(launcher, "agent", *keys)
    for row in rows:
        (start,) = row["starts"]
        assert any(row["learn"][:start]) and any(row["learn"][start:]) and not row["learn"][start]
    assert metrics[0]["engine/mismatch"] < 1e-3, "the learner read other contexts than the engine"
    assert metrics[0]["response/turns_mean"] == 3.0


def test_samples_are_episodes_and_have_scores(launcher: Launcher) -> None:
    keys = ("stages=[sample,score]", "sample.split=train", "sample.prompts=3", "sample.samples_per_prompt=2")
    finish(launcher.ppo("episodes", *keys))
    folder = launcher.run_folder("episodes")
    rows, scores = (pq.read_table(folder / f"{name}.parquet").to_pylist() for name in ("samples", "scores"))
    assert len(rows) == len(scores) == 6
    for row, score in zip(rows, scores, strict=True):
        episode = json.loads(row["meta"])["episode"]
        (held,) = episode["conversations"]
        assert [turn["role"] for turn in held["messages"]] == ["user", "assistant"] * 3
        assert episode["turns"] == 3 and score["reward"] == pytest.approx(episode["reward"])
        assert not all(row["learn"])


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ("raise", "asking"),
        ("kill", "FailsOnSome"),
        pytest.param("raise", "FailsOnSome", marks=pytest.mark.variant),
        pytest.param("kill", "asking", marks=pytest.mark.variant),
    ],
)
def test_failed_episodes_are_dropped_and_counted(launcher: Launcher, how: str, name: str) -> None:
    keys = ("rl.steps=1", f"environment.name={ENVIRONMENTS}:{name}", f"environment.options={{how: {how}}}")
    finish(launcher.ppo(f"{name.lower()}-{how}", *keys, "reward.max_failed_fraction=0.6", "environment.step_s=20"))
    folder = launcher.run_folder(f"{name.lower()}-{how}")
    rows = logged(folder)
    assert 0 < len(rows) < 16 and {json.loads(row["meta"])["number"] % 2 for row in rows} == {0}
    (line,) = [line["metrics"] for line in read_lines(folder / "metrics.jsonl") if line["kind"] == "step"]
    assert line["reward/failed_fraction"] == pytest.approx(1 - len(rows) / 16)


@pytest.mark.parametrize("name", ["FailsOnSome", pytest.param("asking", marks=pytest.mark.variant)])
def test_a_run_stops_above_the_budget_and_names_environment_prompt_and_turn(launcher: Launcher, name: str) -> None:
    keys = ("rl.steps=1", f"environment.name={ENVIRONMENTS}:{name}", "environment.options={how: freeze}")
    process = launcher.ppo(f"over-{name.lower()}", *keys, "reward.max_failed_fraction=0.0", "environment.step_s=5")
    output, _ = process.communicate(timeout=RUN_S)
    assert process.returncode not in (0, None), output
    assert "environment.step_s" in output and name in output and "turn 1" in output, output
