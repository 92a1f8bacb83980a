"""Stages sample, score and evaluate on Ray, with a judge on loopback."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from orchestrator.run.storage import read_json
from tests.deadlines import of_a_run
from tests.integration.pipelines import finish, start
from tests.tiny import tiny_llama
from tests.unit.actors.rewards.test_judge import JudgeServer, saying

NUM_SAMPLES, NUM_HELD_OUT = 12, 6


def answer(text: str) -> tuple[int, Any]:
    """Scores are lengths up to 10; of two replies the longer one is better."""
    if single := re.search(r"<reply>\n(.*)\n</reply>", text, re.DOTALL):
        return saying(f"[[{min(len(single[1]), 10)}]]")
    first, second = (len(match[1]) for match in re.finditer(r"<reply_[AB]>\n(.*?)\n</reply_[AB]>", text, re.DOTALL))
    return saying("[[A]]" if first > second else "[[B]]" if second > first else "[[C]]")


@pytest.fixture
def judge() -> Iterator[JudgeServer]:
    server = JudgeServer(answer)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_judge_scores_and_compares_and_a_resumed_stage_asks_nothing_twice(
    cluster: str,
    base: Path,
    judge: JudgeServer,
    tmp_path: Path,
) -> None:
    replies = "".join(json.dumps({"prompt": "Why?", "completion": "x" * size}) + "\n" for size in (3, 1))
    (tmp_path / "replies.jsonl").write_text(replies)
    outside = {"name": "outside", "kind": "score", "set": {"score.path": str(tmp_path / "replies.jsonl")}}
    section = {"url": judge.url, "model": "m", "retries": 1}
    tree = {
        "stages": ["sample", "score", "evaluate", outside],
        "model": {"path": str(base), "dtype": "float32", "max_length": 128},
        "prompts": {"limit": 60, "max_prompt_tokens": 96, "held_out_fraction": 0.3, "reward_model_fraction": 0.4},
        "sample": {"prompts": NUM_SAMPLES // 2, "samples_per_prompt": 2},
        "reward": {"name": "judge", **section},
        "rollout": {"engine": "hf", "max_new_tokens": 12, "samples_per_shard": 6},
        "evaluation": {"prompts": NUM_HELD_OUT, "gold": None},
        "evaluate": {"against": str(tiny_llama(tmp_path / "other", seed=3)), "judge": section},
        "run": {"root": str(tmp_path), "cache": str(tmp_path / "cache")},
        "telemetry": {"prometheus_port": None, "tensorboard": False},
        "placement": {"wait_s": 5.0},
        "deadlines": of_a_run(),
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    output = finish(start(tmp_path / "config.yaml", cluster, "judged"))
    folder = tmp_path / "judged"
    rewards = pq.read_table(folder / "scores.parquet")["reward"].to_pylist()
    replies = pq.read_table(folder / "samples.parquet")["response_text"].to_pylist()
    assert rewards == [float(min(len(reply), 10)) for reply in replies] and len(rewards) == NUM_SAMPLES
    metrics = read_json(folder / "evaluate" / "result.json")["metrics"]
    mine, theirs = (
        [len(text) for text in pq.read_table(folder / "evaluate" / f"{side}.parquet")["response_text"].to_pylist()]
        for side in ("policy", "against")
    )
    wins = [1.0 if left > right else 0.5 if left == right else 0.0 for left, right in zip(mine, theirs, strict=True)]
    assert metrics["judge_win_rate"] == pytest.approx(sum(wins) / NUM_HELD_OUT)
    assert metrics["judge_win_low"] < metrics["judge_win_rate"] < metrics["judge_win_high"]
    assert metrics["judge_disagreed"] == metrics["judge_failed"] == 0.0
    assert metrics["reward"] == pytest.approx(sum(min(length, 10) for length in mine) / NUM_HELD_OUT)
    (given,) = folder.rglob("replies.parquet")
    assert pq.read_table(given.with_name("scores.parquet"))["reward"].to_pylist() == [3.0, 1.0]
    assert "its answer ends with '[[" in output and "judge_win_rate" in output

    asked = len(judge.requests)
    (folder / "scores.parquet").unlink()
    shutil.rmtree(folder / "evaluate")
    finish(start(tmp_path / "config.yaml", cluster, "judged"))
    assert pq.read_table(folder / "scores.parquet")["reward"].to_pylist() == rewards
    assert read_json(folder / "evaluate" / "result.json")["metrics"] == metrics
    tried = 3 + 2  # by checks: the reward of each stage, and a pair in both orders
    assert len(judge.requests) == asked + tried
