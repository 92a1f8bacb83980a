"""The sft stage on Ray Train, with a model of two layers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from actors.text.conversations import load_chat
from actors.text.learned import rows_of
from orchestrator.data.records import Message
from orchestrator.run.lineage import read_lineage
from orchestrator.run.storage import read_json, sha256
from orchestrator.watching.telemetry import read_lines
from tests.deadlines import of_a_run
from tests.integration.pipelines import finish, kill_when, start


def talk(number: int) -> list[dict[str, str]]:
    """Two exchanges; the second reply repeats a word of the first question."""
    return [
        {"role": "user", "content": f"Say {number}."},
        {"role": "assistant", "content": f"It is {number}."},
        {"role": "user", "content": "Again."},
        {"role": "assistant", "content": f"Again it is {number}."},
    ]


def write_config(base: Path, folder: Path, **keys: Any) -> Path:
    rows = "".join(json.dumps({"messages": talk(number)}) + "\n" for number in range(90))
    (folder / "talks.jsonl").write_text(rows)
    tree = {
        "stages": ["sft"],
        "model": {"path": str(base), "dtype": "float32", "max_length": 128},
        "demonstrations": {"path": str(folder / "talks.jsonl"), "held_out": 10},
        "sft": {"learning_rate": 1e-2, "records_per_batch": 4, "max_length": 64, "epochs": 8, "cpus_per_rank": 1},
        "run": {"root": str(folder)},
        "placement": {"wait_s": 5.0},
        "deadlines": of_a_run(),
        **keys,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def whole(cluster: str, base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("runs")
    output = finish(start(write_config(base, folder), cluster, "whole"))
    return folder / "whole", output


def test_it_learns_replies_and_measures_held_out_ones(whole: tuple[Path, str]) -> None:
    folder, output = whole
    result = read_json(folder / "sft.json")
    assert result["num_records"] == result["num_rows"] == 80 and result["optimizer_steps"] == 160
    assert (result["num_split"], result["num_cut"], result["num_lost"]) == (0, 0, 0)
    steps = [line["metrics"] for line in read_lines(folder / "metrics.jsonl") if line["kind"] == "step"]
    assert len(steps) == 160 and steps[0]["sft/loss"] > 4.0 > 2.0 > result["held_out_loss"]
    assert "sft 160/160" in output and "held-out loss" in output
    (made,) = read_lineage(folder)
    assert (made.kind, made.path, made.stage) == ("policy", "sft", "sft")
    assert not list(folder.glob(".sft*"))


def test_the_loss_is_that_of_transformers_on_the_assistants_tokens(whole: tuple[Path, str]) -> None:
    folder, _ = whole
    chat = load_chat(folder / "sft")
    model = AutoModelForCausalLM.from_pretrained(folder / "sft", dtype=torch.float32)
    total, count = 0.0, 0
    for number in range(80, 90):
        (row,), _ = rows_of(chat, [Message(**turn) for turn in talk(number)])
        ids = torch.tensor(row.tokens[None].astype("int64"))
        labels = ids.masked_fill(~torch.from_numpy(row.learn)[None], -100)
        with torch.no_grad():
            total += float(model(ids, labels=labels).loss) * int(row.learn.sum())
        count += int(row.learn.sum())
    assert read_json(folder / "sft.json")["held_out_loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.variant
def test_a_driver_that_is_killed_and_started_again_ends_with_the_same_bits(
    cluster: str, base: Path, whole: tuple[Path, str], tmp_path: Path
) -> None:
    config = write_config(base, tmp_path)
    keys = ["sft.checkpoint_every_steps=20"]
    killed = start(config, cluster, "killed", *keys)
    kill_when(killed, tmp_path / "killed", ".sft.work/checkpoints/step-00004*")
    output = finish(start(config, cluster, "killed", *keys))
    (again,) = re.findall(r"continues after step (\d+) of 160", output)
    assert int(again) >= 40
    weights = [sha256(folder / "sft" / "model.safetensors") for folder in (whole[0], tmp_path / "killed")]
    assert weights[0] == weights[1]
    assert "nothing is left to do" in finish(start(config, cluster, "killed", *keys))


def test_two_ranks_learn_what_one_learns(cluster: str, base: Path, tmp_path: Path) -> None:
    losses = []
    for ranks in (1, 2):
        keys = [f"sft.ranks={ranks}", "sft.epochs=1", "sft.micro_batch_tokens=80", "sft.neftune_alpha=5"]
        finish(start(write_config(base, tmp_path), cluster, f"of-{ranks}", *keys))
        lines = read_lines(tmp_path / f"of-{ranks}" / "metrics.jsonl")
        losses.append([line["metrics"]["sft/loss"] for line in lines if line["kind"] == "step"])
    assert len(losses[0]) == 20 and losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_reinforcement_learning_starts_from_the_fine_tuned_policy(cluster: str, base: Path, tmp_path: Path) -> None:
    prompts = "".join(json.dumps({"prompt": f"Say {number}."}) + "\n" for number in range(40))
    (tmp_path / "prompts.jsonl").write_text(prompts)
    config = write_config(
        base,
        tmp_path,
        stages=["sft", "rl", "evaluate"],
        prompts={"path": str(tmp_path / "prompts.jsonl"), "max_prompt_tokens": 64},
        rollout={"engine": "hf", "max_new_tokens": 16, "cpus_per_replica": 1},
        reward={"name": "rules", "rules": [{"function": "actors.rewards.rules:length_target"}]},
        algorithm={"name": "grpo", "minibatches": 1},
        rl={"steps": 1, "prompts_per_step": 4, "samples_per_prompt": 2},
        policy={"learning_rate": 1e-9},
        evaluation={"prompts": 4, "gold": "actors.rewards.rules:length_target"},
        telemetry={"prometheus_port": None, "tensorboard": False},
    )
    finish(start(config, cluster, "chain"))
    run = tmp_path / "chain"
    start_of, tuned, learned = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (base, run / "sft", run / "export")
    )
    name = "model.layers.0.mlp.up_proj.weight"
    moved = [float((state[name].float() - learned[name].float()).abs().max()) for state in (start_of, tuned)]
    assert moved[0] > 1e-3 and moved[1] < 1e-4
    made = {entry.path: entry for entry in read_lineage(run)}
    assert made["export"].reads == {"policy": "sft"} and made["evaluate"].reads == {"policy": "export"}
    metrics = read_json(run / "evaluate" / "result.json")["metrics"]
    assert metrics["loss"] == pytest.approx(read_json(run / "sft.json")["held_out_loss"], rel=1e-3)
    assert metrics["loss_against"] > 2 * metrics["loss"]
