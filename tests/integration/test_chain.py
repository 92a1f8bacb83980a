"""Rejection sampling as a pipeline: sample, score, select the best, learn them, evaluate; rules and a tiny model."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from actors.rewards.model import RewardModel
from actors.text.conversations import chat_of
from jobs.services.labelling.items.choosing import Asking
from jobs.services.labelling.items.sources import from_run
from jobs.stages.stage import StageJob
from jobs.stages.work.score import choose_items
from orchestrator.config.loader import load_kept_config
from orchestrator.run.folder import RunFolder
from orchestrator.run.lineage import read_lineage
from orchestrator.run.storage import read_json, sha256
from orchestrator.watching.telemetry import Telemetry
from tests.integration import pipelines
from tests.integration.pipelines import kill_when, start, write_config
from tests.tiny import tiny_llama, tiny_scorer, tiny_tokenizer

finish = partial(pipelines.finish, within_s=240.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("chain")
    tiny_llama(found / "base")
    (found / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Say {n}."}) + "\n" for n in range(60)))
    return found


def config(folder: Path, **keys: Any) -> Path:
    tree = {
        "stages": ["sample", "score", "select", "sft", "evaluate"],
        "prompts": {"path": str(folder / "prompts.jsonl"), "max_prompt_tokens": 64, "held_out_fraction": 0.3},
        "rollout": {"engine": "hf", "max_new_tokens": 24, "cpus_per_replica": 1, "samples_per_shard": 8},
        "sample": {"prompts": 12, "samples_per_prompt": 4, "split": "train"},
        "reward": {"name": "rules", "rules": [{"function": "actors.rewards.rules:length_target"}]},
        "sft": {"learning_rate": 1e-3, "records_per_batch": 4, "max_length": 128, "cpus_per_rank": 1},
        "evaluation": {"prompts": 8, "gold": "actors.rewards.rules:length_target"},
        **keys,
    }
    return write_config(folder, tree)


@pytest.fixture(scope="module")
def whole(cluster: str, folder: Path) -> tuple[Path, str]:
    output = finish(start(config(folder), cluster, "whole"))
    return folder / "whole", output


def test_every_link_leaves_what_the_next_one_reads(whole: tuple[Path, str]) -> None:
    run, output = whole
    samples, scores = (pq.read_table(run / f"{name}.parquet") for name in ("samples", "scores"))
    assert samples.num_rows == scores.num_rows == 48
    chosen = [json.loads(line) for line in (run / "selected.jsonl").read_text().splitlines()]
    stopped = [reason == "stop" for reason in samples["finish_reason"].to_pylist()]
    best: dict[str, float] = {}
    for prompt, score, ended in zip(
        samples["prompt_id"].to_pylist(), scores["reward"].to_pylist(), stopped, strict=True
    ):
        if ended:
            best[prompt] = max(best.get(prompt, -9.0), score)
    assert [row["score"] for row in chosen] == pytest.approx(list(best.values()))
    assert read_json(run / "sft.json")["num_records"] <= len(chosen)
    reads = {entry.path: dict(entry.reads) for entry in read_lineage(run)}
    assert reads == {
        "samples.parquet": {},
        "scores.parquet": {"samples": "samples.parquet"},
        "selected.jsonl": {"samples": "samples.parquet", "scores": "scores.parquet"},
        "sft": {"demonstrations": "selected.jsonl"},
        "evaluate": {"policy": "sft"},
    }
    assert not list(run.glob(".*.work")) and "evaluate: policy compared with" in output


def test_the_evaluation_compares_both_models_on_the_same_prompts(whole: tuple[Path, str]) -> None:
    run, _ = whole
    metrics = read_json(run / "evaluate" / "result.json")["metrics"]
    policy, against = (pq.read_table(run / "evaluate" / f"{name}.parquet") for name in ("policy", "against"))
    assert policy["prompt_id"].to_pylist() == against["prompt_id"].to_pylist() and policy.num_rows == 8
    assert policy["response_text"].to_pylist() != against["response_text"].to_pylist()
    assert metrics["gold_failed"] == 0 and metrics["gold"] == pytest.approx(metrics["reward"], abs=1e-6)
    assert metrics["gold_delta"] == pytest.approx(metrics["gold"] - metrics["gold_against"], abs=1e-6)
    assert metrics["gold_win_low"] <= metrics["gold_win_rate"] <= metrics["gold_win_high"]
    assert metrics["kl"] != 0.0


def test_killed_in_every_stage_it_ends_with_the_same_bits(cluster: str, folder: Path, whole: tuple[Path, str]) -> None:
    path = config(folder)
    for made in (
        ".samples.parquet.work/*/shard-000001.parquet",
        "selected.jsonl",
        ".sft.work",
        "evaluate/policy.parquet",
    ):
        kill_when(start(path, cluster, "killed"), folder / "killed", made, within_s=180.0)
    finish(start(path, cluster, "killed"))
    for name in ("samples.parquet", "scores.parquet", "selected.jsonl", "sft/model.safetensors"):
        assert sha256(folder / "killed" / name) == sha256(whole[0] / name), name
    results = [read_json(run / "evaluate" / "result.json") for run in (whole[0], folder / "killed")]
    assert results[0]["metrics"] == results[1]["metrics"]


def test_a_result_that_was_required_and_is_not_met_ends_with_3_until_it_is(cluster: str, folder: Path) -> None:
    path = config(folder, stages=["evaluate"])
    output = finish(start(path, cluster, "gate", "evaluate.require={gold: '> 5'}"), code=3)
    assert "gold is" in output and "required > 5" in output
    assert "nothing is left to do" not in finish(start(path, cluster, "gate", "evaluate.require={gold: '> -5'}"))
    assert "nothing is left to do" in finish(start(path, cluster, "gate", "evaluate.require={gold: '> -5'}"))


async def test_items_for_people_are_chosen_by_the_states_of_a_reward_model(
    cluster: str, folder: Path, whole: tuple[Path, str]
) -> None:
    """As stage `people` asks for them. An attempt after a kill reads what is kept, and starts no actor."""
    config_ = load_kept_config(config(folder))
    scorer = tiny_scorer(folder / "scorer", heads=2)
    place = RunFolder(folder / "asking", "asking", 1)
    place.path.mkdir()
    samples = pq.read_table(whole[0] / "samples.parquet")
    candidates = list(from_run(whole[0], stage=None, step=None))
    seen: list[int] = []
    with Telemetry(place.path, place.id, place.attempt, stage="people") as telemetry:
        job = StageJob(
            name="people",
            config=config_,
            run=place,
            makes=(),
            prepared=None,  # type: ignore[arg-type]  # nothing reads it
            telemetry=telemetry,
            say=lambda line: None,
            inputs={"reward_model": scorer},
            start_policy="",
            watch=lambda groups: seen.append(len(groups)),
        )
        found = await choose_items(job, samples, candidates, Asking("rank", 6, 0.5))
        started = len(seen)
        assert await choose_items(job, samples, candidates, Asking("rank", 6, 0.5)) == found
    assert started == len(seen) == 1
    arms = [each.source["choice"]["arm"] for each in found.candidates]
    assert sorted(arms) == ["active"] * 3 + ["control"] * 3
    states = pq.read_table(place.path / "states.parquet")
    here = RewardModel(
        scorer,
        chat_of(tiny_tokenizer()),
        dtype=torch.float32,
        device=torch.device("cpu"),
        micro_batch_tokens=4096,
        normalise=False,
        max_length=config_.reward_model.max_length,
    ).states(samples)
    for name in ("heads", "state"):
        assert np.array(states[name].to_pylist()) == pytest.approx(np.array(here[name].to_pylist()), abs=1e-5)
