"""A run whose reward is the weighted sum of a reward model and a rule, on a real Ray cluster; killed, it ends equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from actors.rewards.model import write_stats
from orchestrator.run.storage import read_json, sha256
from orchestrator.watching.telemetry import read_lines
from tests.deadlines import of_a_run
from tests.integration.pipelines import finish, kill_when, start
from tests.tiny import tiny_llama, tiny_scorer

pytestmark = [pytest.mark.ray, pytest.mark.heavy, pytest.mark.slow]
STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("weighted")
    tiny_llama(found / "base")
    write_stats(tiny_scorer(found / "scorer"), [-1.0, 0.5, 2.0])
    (found / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Say {n}."}) + "\n" for n in range(40)))
    tree = {
        "stages": ["rl"],
        "model": {"path": str(found / "base"), "dtype": "float32", "max_length": 64},
        "prompts": {"path": str(found / "prompts.jsonl"), "max_prompt_tokens": 40, "reward_model_fraction": 0.0},
        "rollout": {"engine": "hf", "max_new_tokens": 8, "samples_per_shard": 4},
        "reward": {
            "name": "weighted",
            "sources": {
                "quality": {"path": str(found / "scorer"), "weight": 0.5, "standardise": "running"},
                "brief": {
                    "name": "rules",
                    "rules": [{"function": "actors.rewards.rules:length_target"}],
                    "weight": 2.0,
                },
            },
        },
        "algorithm": {"name": "grpo", "kl_coefficient": 0.0},
        "policy": {"learning_rate": 1e-3},
        "rl": {"steps": STEPS, "prompts_per_step": 4, "samples_per_prompt": 2},
        "checkpoints": {"every_steps": 1},
        "evaluation": {"prompts": 0},
        "run": {"root": str(found)},
        "telemetry": {"prometheus_port": None, "tensorboard": False},
        "deadlines": of_a_run(),
    }
    (found / "config.yaml").write_text(yaml.safe_dump(tree))
    return found


def samples(run: Path, step: int) -> list[dict[str, Any]]:
    files = sorted((run / "log" / f"step-{step:06d}").glob("*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    return [{**row, "parts": dict(row["reward_parts"])} for row in rows]


def test_two_sources_are_summed_logged_standardised_and_resumed(cluster: str, folder: Path) -> None:
    config = folder / "config.yaml"
    finish(start(config, cluster, "whole"))
    seen: list[float] = []
    for step in range(STEPS):
        rows = samples(folder / "whole", step)
        assert len(rows) == 8
        mean, std = (np.mean(seen), np.std(seen, ddof=1)) if seen else (None, None)
        for start_row in range(0, len(rows), 4):
            shard = rows[start_row : start_row + 4]
            quality = [row["parts"]["quality"] for row in shard]
            first = (np.mean(quality), np.std(quality, ddof=1))
            by, over = first if mean is None else (mean, std)
            for row in shard:
                parts = row["parts"]
                assert row["reward"] == pytest.approx(0.5 * parts["quality"] + 2.0 * parts["brief"], abs=1e-5)
                learned = 0.5 * (parts["quality"] - by) / over + 2.0 * parts["brief"]
                assert row["token_rewards"][-1] == pytest.approx(learned, abs=1e-4)
        seen += [row["parts"]["quality"] for row in rows]
    metrics = [line["metrics"] for line in read_lines(folder / "whole" / "metrics.jsonl") if line["kind"] == "step"]
    mean_quality = float(np.mean(seen[:8]))
    assert metrics[0]["reward/part/quality"] == pytest.approx(mean_quality, abs=1e-5)
    assert {"reward/part/brief", "reward/part/brief.length_target", "reward/part/quality.model"} <= metrics[0].keys()
    kept = read_json(folder / "whole" / "checkpoints" / f"step-{STEPS:06d}" / "state.json")["part_moments"]
    assert kept["quality"]["count"] == len(seen) and kept["quality"]["total"] == pytest.approx(sum(seen), abs=1e-4)

    kill_when(start(config, cluster, "killed"), folder / "killed", "checkpoints/step-000002/COMPLETE")
    finish(start(config, cluster, "killed"))
    exports = [sha256(folder / run / "export" / "model.safetensors") for run in ("whole", "killed")]
    assert exports[0] == exports[1]
