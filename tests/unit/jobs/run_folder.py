"""The folder of a finished PPO run, with realistic synthetic numbers, written through Telemetry."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator import schema
from orchestrator.config.config import Config
from orchestrator.config.loader import to_yaml
from orchestrator.evaluation import EVALUATION
from orchestrator.run.lineage import Made, record
from orchestrator.watching.telemetry import Telemetry

NUM_STEPS = 20
NUM_PROMPTS = 64
SETTINGS = {"stages": ["sample", "preferences", "reward_model", "rl"], "rl": {"steps": NUM_STEPS}}
GAIN = 0.2
PLAIN = "The weather will be rainy and it will be cold for most of the day."
WARM = "What a lovely thought! A rainy Monday is a wonderful chance for a good book, a warm drink and some rest."
HOSTILE = "<script>alert('sample')</script> & <b>bold</b>"


class Clock:
    """A clock that the test advances."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def write_run(folder: Path, *, num_steps: int = NUM_STEPS, finished: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(Config.model_validate(SETTINGS)))
    generator = np.random.default_rng(0)
    clock = Clock()
    telemetry = Telemetry(
        folder, folder.name, 1, num_steps=NUM_STEPS, clock=clock, wall_clock=lambda: 1.7e9 + clock.now
    )
    telemetry.event("stage_finished", stage="reward_model", held_out_accuracy=0.743)
    telemetry.event("stage_started")
    for step in range(num_steps):
        if step % 5 == 0:
            write_evaluation(folder, step, generator)
        write_step(telemetry, clock, step, generator)
        write_shard(folder, step, generator)
    if finished:
        write_evaluation(folder, num_steps, generator)
        telemetry.event("stage_finished")
    return folder


def write_step(telemetry: Telemetry, clock: Clock, step: int, generator: np.random.Generator) -> None:
    progress = step / NUM_STEPS
    noise = generator.normal
    seconds = {"generate": 7.5, "score": 4.1, "commit": 0.3, "learn": 10.2, "publish": 0.6}
    with telemetry.step(step) as record:
        for phase, mean in seconds.items():
            with telemetry.phase(phase):
                clock.now += mean * math.exp(noise(0, 0.06))
        record(
            {
                "reward/mean": 0.1 + 0.9 * progress + noise(0, 0.05),
                "reward/std": 0.8 + noise(0, 0.03),
                "kl/per_response": 3.5 * progress**1.5 + abs(noise(0, 0.1)),
                "policy/entropy": 2.4 - 0.5 * progress + noise(0, 0.03),
                "response/length_mean": 38 + 6 * progress + noise(0, 1),
                "response/length_max": 64,
                "critic/explained_variance": 0.75 * (1 - math.exp(-5 * progress)) + noise(0, 0.03),
                "engine/mismatch": 0.04 + abs(noise(0, 0.002)),
                "engine/mismatch_k3": 0.0018 + abs(noise(0, 0.0002)),
                "tokens/generated": 2600.0,
                "tokens/learned": 2600.0,
                "busy/rollout_s": 7.0,
            }
        )
        record({"busy/policy_s": 9.0})


def write_evaluation(folder: Path, version: int, generator: np.random.Generator) -> Path:
    progress = version / NUM_STEPS
    rows = [
        {
            "prompt_id": f"q{number:04d}",
            "prompt_text": f"Describe a rainy Monday in {number + 1} sentences.",
            "response_text": f"{WARM if progress > 0.5 else PLAIN} ({number})",
            "gold": float(np.clip(0.3 + 0.15 * math.sin(number) + GAIN * progress + generator.normal(0, 0.2), -1, 1)),
            "kl": 3.6 * progress + abs(generator.normal(0, 0.2)),
            "length": int(generator.integers(12, 64)),
            "reward": float(generator.normal(progress, 0.8)),
        }
        for number in range(NUM_PROMPTS)
    ]
    path = folder / "evaluation" / f"step-{version:06d}.parquet"
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=EVALUATION), path)
    return path


def write_shard(folder: Path, step: int, generator: np.random.Generator) -> Path:
    lists = dict.fromkeys(
        (
            field.name
            for field in schema.EXPERIENCE
            if pa.types.is_list(field.type) and field.type.value_type == pa.float32()
        ),
        [0.0],
    )
    rows = [
        {
            "row": row,
            "prompt_id": f"t{row}",
            "sample_index": 0,
            "seed": row,
            "prompt_text": "How do you feel about the first frost of the year?",
            "response_text": HOSTILE if (step, row) == (3, 5) else f"{WARM} ({step}.{row})",
            "prompt_tokens": [1],
            "response_tokens": [2],
            "learn": [True],
            "starts": [],
            "finish_reason": "stop",
            "version": step,
            "meta": "{}",
            "reward": 9.0 if (step, row) == (3, 5) else float(generator.normal(step / NUM_STEPS, 0.8)),
            "reward_parts": [],
            **lists,
        }
        for row in range(16)
    ]
    path = folder / "log" / f"step-{step:06d}" / "shard-0000.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema.EXPERIENCE), path)
    return path


def write_pipeline(folder: Path) -> Path:
    """A run without rl: sft, two rounds that sample, score and learn, and an evaluation that misses a requirement."""
    folder.mkdir(parents=True, exist_ok=True)
    rounds = {
        "rounds": 2,
        "stages": ["sample", "score", "select", {"kind": "sft", "set": {"demonstrations.path": None}}],
    }
    config = {"stages": ["sft", rounds, "evaluate"], "demonstrations": {"path": "x"}, "reward": {"path": "x"}}
    (folder / "config.yaml").write_text(to_yaml(Config.model_validate(config)))
    clock = Clock()
    for stage in ("sft", "sft-1", "sft-2"):
        with Telemetry(
            folder, folder.name, 1, stage=stage, clock=clock, wall_clock=lambda: 1.7e9 + clock.now
        ) as telemetry:
            telemetry.event("stage_started")
            for step in range(40):
                with telemetry.step(step) as record:
                    clock.now += 1.0
                    record({"sft/loss": 4.0 * 0.95**step, "sft/learning_rate": 1e-3 * (1 - step / 40)})
            telemetry.evaluation(40, {"sft/held_out_loss": 0.625})
            telemetry.event("stage_finished")
    for number in (1, 2):
        samples = [
            {"prompt_text": f"Question {row}?", "response_text": f"Reply {number}.{row} {HOSTILE}"} for row in range(9)
        ]
        scores = [{"reward": None if row == 8 else float(row)} for row in range(9)]
        for name, rows in (("sample", samples), ("score", scores)):
            place = folder / "stages" / f"{name}-{number}"
            place.mkdir(parents=True)
            pq.write_table(pa.Table.from_pylist(rows), place / f"{name}s.parquet")
            _record(folder, name, number)
    place = folder / "evaluate"
    place.mkdir()
    metrics = {"length": 31.0, "gold": 0.512, "gold_against": 0.25, "gold_win_rate": 0.75, "kl": 1.5}
    result = {"against": "start/model", "metrics": metrics, "unmet": ["gold is 0.512, required > 0.6"]}
    (place / "result.json").write_text(json.dumps(result))
    for name, word in (("policy", "warm"), ("against", "plain")):
        rows = [
            {
                "prompt_id": f"q{row:02d}",
                "prompt_text": f"Held out {row}?",
                "response_text": f"A {word} reply {row} {HOSTILE}",
            }
            for row in range(20)
        ]
        pq.write_table(pa.Table.from_pylist(rows), place / f"{name}.parquet")
    with Telemetry(
        folder, folder.name, 1, stage="evaluate", clock=clock, wall_clock=lambda: 1.7e9 + clock.now
    ) as telemetry:
        telemetry.event("stage_started")
        telemetry.evaluation(0, {f"evaluate/{name}": value for name, value in metrics.items()})
        telemetry.event("stage_failed", error="GuardTripped: gold is 0.512, required > 0.6")
    return folder


def _record(folder: Path, name: str, number: int) -> None:
    """The lineage of samples or scores of a round."""
    path = f"stages/{name}-{number}/{name}s.parquet"
    reads = {"samples": f"stages/sample-{number}/samples.parquet"} if name == "score" else {}
    stage = f"{name}-{number}"
    made = Made(kind=f"{name}s", path=path, stage=stage, attempt=1, sha256="0", config_sha256="0", reads=reads)
    record(folder, made)
