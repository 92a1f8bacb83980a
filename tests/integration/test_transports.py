"""The sequence of publishing on GPUs, over its twin between CPUs: the same bits as through the host, also if engines
die in the middle, and no altered tensor goes unnoticed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaForCausalLM

from actors.remote.transports import CollectiveTransport, SharedTransport
from jobs.stages.work.replay import fingerprint
from orchestrator.watching.telemetry import read_lines
from tests.deadlines import of_a_run, scaled
from tests.integration.colocated_steps import LEARNING_RATE, require_learning, steps_in_turns
from tests.integration.publish_faults import PHASES, plan_in
from tests.integration.publishing_sides import Sides, one_digest_and_altered_tensors_are_named
from tests.local_ray import local_ray
from tests.tiny import tiny_config, tiny_tokenizer

pytestmark = [pytest.mark.ray, pytest.mark.heavy, pytest.mark.slow, pytest.mark.timeout(scaled(1200))]

ROOT = Path(__file__).resolve().parents[2]
STEPS = 3  # and so four publishes
RUN_S = scaled(480.0)
OFTEN = ("update", "confirm")
UP_PROJ = "model.layers.1.mlp.up_proj.weight"
VARIES = ("time/", "busy/", "idle/", "memory/")  # prefixes of metrics that differ between equal runs


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with local_ray("tp", num_cpus=4) as found:
        yield found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of 3 MB: three buckets of the smallest size."""
    folder = tmp_path_factory.mktemp("model")
    config = tiny_config()
    config.intermediate_size, config.num_hidden_layers = 1024, 4
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def settings(folder: Path, model: Path) -> dict[str, Any]:
    return {
        "stages": ["rl"],
        "run": {"root": str(folder / "runs")},
        "model": {"path": str(model), "max_length": 128, "dtype": "float32"},
        "prompts": {"limit": 60, "max_prompt_tokens": 100},
        "reward": {"name": "rules", "rules": [{"function": "actors.rewards.rules:length_target"}]},
        "policy": {"learning_rate": 1e-3, "ranks": 2},
        "publish": {"bucket_mib": 1},
        "rollout": {
            "replicas": 2,
            "cpus_per_replica": 1,
            "max_new_tokens": 8,
            "samples_per_shard": 8,
            "kv_cache_gib": 0.1,
            "engine": "vllm",
        },
        "rl": {"steps": STEPS, "prompts_per_step": 4, "samples_per_prompt": 4},
        "algorithm": {"name": "grpo"},
        "checkpoints": {"every_steps": STEPS, "export": False},
        "evaluation": {"prompts": 0},
        "telemetry": {"prometheus_port": None, "tensorboard": False},
        "deadlines": of_a_run(),
    }


def run(address: str, folder: Path, transport: str, phases: tuple[str, ...] = ()) -> Path:
    """The folder of a run that ended well."""
    plan_in(folder, list(phases))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.integration.publish_faults", str(folder)),
            *("--config", str(folder / "config.yaml"), f"run.id={transport}", f"publish.transport={transport}"),
        ],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": address},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=RUN_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return folder / "runs" / transport


def learned(folder: Path) -> tuple[str, list[dict[str, Any]]]:
    """Bits of the last checkpoint, and the metrics of all steps."""
    lines = [line["metrics"] for line in read_lines(folder / "metrics.jsonl") if line["kind"] == "step"]
    kept = [
        {name: value for name, value in line.items() if not name.startswith(VARIES) and not name.endswith("_s")}
        for line in lines
    ]
    return fingerprint(folder / "checkpoints" / f"step-{STEPS:06d}", "policy"), kept


@pytest.mark.variant  # minutes; the next test takes the same transports, and fakes have the order of their calls
@pytest.mark.parametrize("phases", [OFTEN, tuple(phase for phase in PHASES if phase not in OFTEN)])
def test_a_broadcast_in_which_engines_die_ends_as_the_host_path(
    address: str, model: Path, tmp_path: Path, phases: tuple[str, ...]
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings(tmp_path, model)), encoding="utf-8")
    host = run(address, tmp_path, "host")
    killed = run(address, tmp_path, "collective", phases)
    assert {path.suffix[1:] for path in tmp_path.glob("struck.*")} == set(phases)
    bits, metrics = learned(host)
    assert len(metrics) == STEPS
    assert learned(killed) == (bits, metrics)
    events = [json.loads(line) for line in (killed / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    failures = [event for event in events if event["kind"] == "failure"]
    assert [(event["role"], event["error"]) for event in failures] == [("rollout", "RoleDied")] * len(phases)


async def test_an_engine_and_a_learner_take_turns_and_samples_come_from_what_was_learned(
    address: str, model: Path
) -> None:
    async with Sides(model, ranks=1, engines=1, zero_stage=1, learning_rate=LEARNING_RATE) as sides:
        publisher = sides.over(SharedTransport)
        steps = await steps_in_turns(sides, publisher)
        assert publisher.num_breaks == 0
    require_learning(steps, tolerance=1e-4)


async def test_partitions_layers_and_what_is_sent_have_one_digest_and_an_altered_tensor_is_named(
    address: str, model: Path
) -> None:
    """Over both transports of GPUs. The parameters of the policy are partitioned (ZeRO-3)."""
    async with Sides(model, ranks=2, engines=2, zero_stage=3) as sides:
        for transport in (CollectiveTransport, SharedTransport):
            await one_digest_and_altered_tensors_are_named(sides, sides.over(transport), UP_PROJ)
