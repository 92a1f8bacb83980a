"""A complete tiny run with real vLLM, DeepSpeed and Ray equals its replay. tests/chaos kills such runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from jobs.stages.work.replay import fingerprint
from orchestrator.run.checkpoints import verify
from orchestrator.run.mirror import Mirror
from orchestrator.run.storage import read_json, sha256
from orchestrator.watching.telemetry import read_lines
from tests.deadlines import of_a_run, scaled
from tests.local_ray import local_ray
from tests.tiny import tiny_llama

pytestmark = [pytest.mark.ray, pytest.mark.heavy, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4
RUN_S = scaled(240.0)


@dataclass(frozen=True)
class Launcher:
    """Runs this program's commands on the tests' cluster, one run folder per id."""

    folder: Path
    address: str

    def start(self, command: str, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "jobs", command, *arguments],
            cwd=ROOT,
            env={**os.environ, "RAY_ADDRESS": self.address},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def ppo(self, run_id: str, *keys: str) -> subprocess.Popen[str]:
        return self.start("run", "--config", str(self.folder / "config.yaml"), f"run.id={run_id}", *keys)

    def run_folder(self, run_id: str) -> Path:
        return self.folder / "runs" / run_id


def finish(process: subprocess.Popen[str]) -> str:
    """The output of a process that succeeds in time."""
    try:
        output, _ = process.communicate(timeout=RUN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        pytest.fail(f"no end within {RUN_S:.0f} s:\n{output}")
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    folder = tmp_path_factory.mktemp("run")
    settings = {
        "stages": ["rl"],
        "run": {"root": str(folder / "runs")},
        "model": {"path": str(tiny_llama(folder / "model")), "max_length": 128},
        "prompts": {"limit": 60, "max_prompt_tokens": 100},
        "reward": {"name": "rules", "rules": [{"function": "actors.rewards.rules:length_target"}]},
        "policy": {"learning_rate": 1e-3, "schedule": "linear", "warmup_optimizer_steps": 2},
        "critic": {"learning_rate": 1e-3, "warmup_steps": 1},
        "rollout": {"max_new_tokens": 16, "samples_per_shard": 8, "kv_cache_gib": 0.1},
        "rl": {"steps": STEPS, "prompts_per_step": 16, "samples_per_prompt": 1},
        "algorithm": {"minibatches": 2, "adaptive_kl_target": 0.5},
        "checkpoints": {"every_steps": 2},
        "evaluation": {"prompts": 0},
        "telemetry": {"prometheus_port": None, "tensorboard": False},
        "deadlines": of_a_run(),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    with local_ray("rn") as address:
        yield Launcher(folder, address)


@pytest.fixture(scope="module")
def whole(launcher: Launcher) -> Path:
    """Folder of an undisturbed run."""
    finish(launcher.ppo("whole"))
    return launcher.run_folder("whole")


def steps_written(folder: Path) -> list[int]:
    return [line["step"] for line in read_lines(folder / "metrics.jsonl") if line["kind"] == "step"]


def shards(folder: Path, step: int) -> list[dict[str, Any]]:
    """The manifest's entries of a committed step."""
    manifest = json.loads((folder / "log" / f"step-{step:06d}" / "manifest.json").read_text(encoding="utf-8"))
    found: list[dict[str, Any]] = manifest["shards"]
    return found


def assert_same_bits(one: Path, other: Path) -> None:
    """Weights, fp32 master weights and optimizers of the last checkpoint, and the exported policy."""
    last = f"checkpoints/step-{STEPS:06d}"
    for role in ("policy", "critic"):
        assert fingerprint(one / last, role) == fingerprint(other / last, role), role
    assert sha256(one / "export" / "model.safetensors") == sha256(other / "export" / "model.safetensors")


def test_a_run_learns_and_leaves_everything_behind(launcher: Launcher, whole: Path) -> None:
    assert steps_written(whole) == list(range(STEPS))
    metrics = [line["metrics"] for line in read_lines(whole / "metrics.jsonl")]
    # k1 of a few samples may be negative; k3 may not.
    assert metrics[0]["kl/per_token_k3"] == 0.0 < metrics[-1]["kl/per_token_k3"]
    assert all(line["publish/tensors_verified"] > 10 for line in metrics)
    assert len({line["kl/coefficient"] for line in metrics}) > 1, "the adaptive coefficient never changed"
    verify(whole / "checkpoints" / f"step-{STEPS:06d}")
    assert "</html>" in (whole / "report.html").read_text(encoding="utf-8")
    start = AutoModelForCausalLM.from_pretrained(launcher.folder / "model").state_dict()
    learned = AutoModelForCausalLM.from_pretrained(whole / "export").state_dict()
    assert start.keys() == learned.keys()
    embeddings = learned["model.embed_tokens.weight"]
    assert not torch.equal(start["model.embed_tokens.weight"].to(embeddings.dtype), embeddings)


def test_a_replay_of_the_log_ends_with_the_runs_own_bits(launcher: Launcher, whole: Path, tmp_path: Path) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    output = finish(launcher.start("replay", str(whole), "--to", str(tmp_path / "again")))
    assert output.count(f"equal to the run's own step-{STEPS:06d}") == 2, output
    assert fingerprint(tmp_path / "again" / "checkpoints" / f"step-{STEPS:06d}", "policy") in output
    assert_same_bits(whole, tmp_path / "again")
    assert (whole / "metrics.jsonl").read_bytes() == before, "a replay changed the run's own files"


def test_a_replay_may_start_from_a_checkpoint(launcher: Launcher, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "checkpoints" / f"step-{STEPS:06d}")
    finish(launcher.start("replay", str(tmp_path / "copy"), "--from-checkpoint"))
    assert_same_bits(whole, tmp_path / "copy" / "replay")
    assert steps_written(tmp_path / "copy" / "replay") == [2, 3]


@pytest.mark.parametrize(
    "advantage", ["remax", "dapo", *(pytest.param(name, marks=pytest.mark.variant) for name in ("grpo", "rloo"))]
)
def test_a_run_without_a_critic_learns_and_equals_its_replay(
    launcher: Launcher, tmp_path: Path, advantage: str
) -> None:
    """With ReMax the fourth sample of a prompt is the greedy one; with DAPO prompts are replaced."""
    decay = 0.5 if advantage == "rloo" else 0.0
    samples = 3 if advantage == "remax" else 4
    keys = (f"algorithm.name={advantage}", "rl.prompts_per_step=4", f"rl.samples_per_prompt={samples}", "rl.steps=2")
    if advantage in {"remax", "dapo"}:
        keys = (*keys, "rollout.engine=hf")  # starts faster; both engines draw greedy samples in tests of their own
    if advantage == "dapo":
        keys = (*keys, "algorithm.adaptive_kl_target=null")  # DAPO has no KL
    finish(launcher.ppo(advantage, *keys, f"policy.ema_decay={decay}"))
    folder = launcher.run_folder(advantage)
    last = "checkpoints/step-000002"
    assert not (folder / last / "critic").exists()
    assert (folder / last / "policy" / "average.safetensors").exists() == bool(decay)
    metrics = [line["metrics"] for line in read_lines(folder / "metrics.jsonl") if line["kind"] == "step"]
    assert metrics[0]["kl/per_token_k3"] == 0.0 < metrics[1]["kl/per_token_k3"], "the policy never learned"
    assert "busy/critic_s" not in metrics[0]
    kept = [sum(record["num_samples"] for record in shards(folder, step)) for step in (0, 1)]
    assert kept == [4 * samples] * 2
    if advantage == "dapo":
        assert metrics[0]["filter/prompts_kept"] == 4 <= metrics[0]["filter/prompts_sampled"]
    output = finish(launcher.start("replay", str(folder), "--to", str(tmp_path / "again")))
    assert output.count("equal to the run's own step-000002") == 1, output
    assert fingerprint(folder / last, "policy") == fingerprint(tmp_path / "again" / last, "policy")


def test_a_run_whose_folder_is_lost_goes_on_from_its_mirror(launcher: Launcher, whole: Path, tmp_path: Path) -> None:
    keys = ("run.id=lost", f"run.mirror={tmp_path}", "run.mirror_every_s=0.5")
    command = ("run", "--config", str(launcher.folder / "config.yaml"), *keys)
    folder = launcher.run_folder("lost")
    killed = launcher.start(*command)
    mirror = Mirror(str(tmp_path), "lost")
    wait_until(killed, lambda: any("checkpoints/step-000002" in path for path in newest_files(mirror)))
    killed.kill()
    killed.communicate()
    shutil.rmtree(folder)
    output = finish(launcher.start(*command))
    assert "run lost: restored the lost folder" in output
    assert steps_written(folder) == list(range(STEPS))
    assert_same_bits(whole, folder)
    assert f"checkpoints/step-{STEPS:06d}/COMPLETE" in newest_files(mirror)


def test_a_killed_run_on_one_trunk_ends_as_an_undisturbed_one(launcher: Launcher) -> None:
    keys = ("policy.lora.rank=4", "critic.lora.rank=4", "policy.learning_rate=0.01", "model.dtype=float32")
    output = finish(launcher.ppo("trunk", *keys))
    assert "policy 0:" in output and "reference 0:" not in output and "critic 0:" not in output
    whole, folder = launcher.run_folder("trunk"), launcher.run_folder("trunk-killed")
    metrics = [line["metrics"] for line in read_lines(whole / "metrics.jsonl") if line["kind"] == "step"]
    assert metrics[0]["kl/per_token_k3"] == 0.0 < metrics[-1]["kl/per_token_k3"]
    assert all(line["publish/tensors_verified"] > 10 for line in metrics)
    assert all(line["engine/mismatch_max"] < 1e-4 for line in metrics), "merged weights compute something else"
    killed = launcher.ppo("trunk-killed", *keys)
    wait_until(killed, (folder / "checkpoints" / "step-000002" / "COMPLETE").exists)
    killed.kill()
    killed.communicate()
    finish(launcher.ppo("trunk-killed", *keys))
    assert steps_written(folder) == list(range(STEPS))
    assert_same_bits(whole, folder)
    adapter = Path("export", "adapter", "adapter_model.safetensors")
    assert sha256(whole / adapter) == sha256(folder / adapter)
    output = finish(launcher.start("replay", str(whole), "--to", str(launcher.folder / "trunk-again")))
    assert output.count(f"equal to the run's own step-{STEPS:06d}") == 2, output


def newest_files(mirror: Mirror) -> Mapping[str, str]:
    names = mirror.names()
    return mirror.read(names[-1]).files if names else {}


def wait_until(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + RUN_S
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"it ended, or {RUN_S:.0f} s went by:\n{process.communicate()[0]}")
        time.sleep(0.05)


def test_the_best_checkpoint_is_kept_named_and_exported(launcher: Launcher) -> None:
    """The first step warms up the critic, so version 1 is the initial policy, within any bound on KL."""
    keys = ("rl.steps=3", "policy.learning_rate=0.01", "checkpoints.every_steps=1", "checkpoints.keep=1")
    evaluating = ("evaluation.prompts=12", "evaluation.every_steps=1", "checkpoints.best_max_kl=0.000001")
    output = finish(launcher.ppo("best", *keys, *evaluating))
    folder = launcher.run_folder("best")
    kl = [line["metrics"]["evaluation/kl_per_response"] for line in read_lines(folder / "metrics.jsonl")
          if line["kind"] == "evaluation"]  # fmt: skip
    assert kl[:2] == [0.0, 0.0] and min(kl[2:]) > 1e-6, kl
    complete = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    assert complete == ["step-000001", "step-000003"]
    assert read_json(folder / "checkpoints" / "best.json")["step"] == 1
    assert "best by evaluation: version 1, evaluation/gold_mean" in output
    start = AutoModelForCausalLM.from_pretrained(launcher.folder / "model").state_dict()
    best = AutoModelForCausalLM.from_pretrained(folder / "export-best").state_dict()
    assert all(torch.equal(start[name].to(tensor.dtype), tensor) for name, tensor in best.items())
    assert "best checkpoint: version 1, " in finish(launcher.start("why", str(folder)))
    assert "Best checkpoint" in (folder / "report.html").read_text(encoding="utf-8")


def test_a_reward_model_trained_alone_is_told_as_finished_and_the_run_goes_on_with_ppo(
    launcher: Launcher, tmp_path: Path
) -> None:
    rows = [{"prompt": f"Say {n}.", "chosen": f"It is {n}, kind", "rejected": f"It is {n}, rude"} for n in range(12)]
    (tmp_path / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = ("--config", str(launcher.folder / "config.yaml"), "run.id=alone")
    keys = (f"preferences.path={tmp_path / 'preferences.jsonl'}", "reward={name: model}", "rl.steps=1")
    keys += ("reward_model.max_length=20", "reward_model.cpus_per_rank=1", "reward_model.learning_rate=0.003")
    finish(launcher.start("reward-model", *config, *keys, "stages=[reward_model]"))
    told = finish(launcher.start("why", str(launcher.run_folder("alone"))))
    assert "alone: finished" in told and "reward_model finished" in told and "nothing failed" in told
    longer = finish(launcher.start("run", *config, *keys, "stages=[reward_model,rl]"))
    assert "alone, attempt 2" in longer and "reward model 1/" not in longer, "it was trained again"
    (step,) = (line for line in read_lines(launcher.run_folder("alone") / "metrics.jsonl") if line["stage"] == "rl")
    assert step["metrics"]["reward/cut"] == 16.0
    assert "16 transcripts cut for the reward model" in longer
    told = finish(launcher.start("why", str(launcher.run_folder("alone"))))
    assert "alone: finished" in told and ": finished" in told.partition("Earlier attempts")[2]
