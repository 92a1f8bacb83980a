"""Tasks of lm-eval on a model of two layers, where the package is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.learning.distributed import Group
from actors.roles.tasks import TaskWorker, found_tasks
from jobs.check.tasks import check_tasks
from jobs.stages.stage import Found
from orchestrator.config.loader import config_from_tree
from orchestrator.config.sections import ModelConfig
from orchestrator.errors import DataError
from orchestrator.run.storage import read_json
from tests.deadlines import of_a_run, scaled
from tests.integration.pipelines import finish, start
from tests.tiny import tiny_llama

pytest.importorskip("lm_eval")
ROWS = [{"question": f"{n} and {n + 1}", "choices": [f"{n}", f"{n + 2}"], "answer": n % 2} for n in range(20)]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    description = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}} =",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "sums.yaml").write_text(yaml.safe_dump(description))
    return folder / "sums.yaml"


def accuracy(model: Path) -> float:
    """By transformers alone: the choice with the higher log-prob."""
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)

    def logprob(context: str, choice: str) -> float:
        start, whole = tokenizer(context)["input_ids"], tokenizer(f"{context} {choice}")["input_ids"]
        with torch.no_grad():
            log_p = loaded(torch.tensor([whole])).logits[0].log_softmax(-1)
        return sum(float(log_p[place - 1, whole[place]]) for place in range(len(start), len(whole)))

    found = []
    for row in ROWS:
        scores = [logprob(f"{row['question']} =", choice) for choice in row["choices"]]
        found.append(scores.index(max(scores)) == row["answer"])
    return sum(found) / len(found)


def measured(model: Path, task: Path) -> Any:
    worker = TaskWorker(ModelConfig(path=str(model), dtype="float32"), model, 1024, Group())
    worker.start([str(task)])
    num_batches, found = worker.wait(scaled(60.0))
    assert num_batches > 0
    return found


def test_a_multiple_choice_task_is_measured_as_by_hand(base: Path, task: Path) -> None:
    found = measured(base, task)
    assert found["sums/acc"] == pytest.approx(accuracy(base)) and "sums/acc_stderr" in found


def test_unknown_tasks_and_broken_files_are_told_before_a_run(tmp_path: Path, task: Path) -> None:
    config = config_from_tree({"evaluate": {"tasks": ["arc_easy", str(task)]}}, source="test")
    assert "arc_easy" in str(check_tasks(config, Found(None, None, None)))
    with pytest.raises(DataError, match="knows no task 'arc_eezy'"):
        found_tasks(["arc_eezy"])
    (tmp_path / "bad.yaml").write_text("task: [")
    with pytest.raises(DataError, match=r"bad\.yaml can't be read"):
        found_tasks([str(tmp_path / "bad.yaml")])


def test_a_failing_task_is_an_error_of_the_data(base: Path, task: Path, tmp_path: Path) -> None:
    (tmp_path / "lost.yaml").write_text(task.read_text().replace("rows.jsonl", "lost.jsonl"))
    with pytest.raises(DataError, match="lm-eval failed"):
        measured(base, tmp_path / "lost.yaml")


def test_a_pipeline_measures_both_models_and_can_require_a_result(
    cluster: str, base: Path, task: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Say {n}."}) + "\n" for n in range(40)))
    other = tiny_llama(tmp_path / "other", seed=5)
    tree = {
        "stages": ["evaluate"],
        "model": {"path": str(base), "dtype": "float32", "max_length": 128},
        "prompts": {
            "path": str(tmp_path / "prompts.jsonl"),
            "max_prompt_tokens": 64,
            "held_out_fraction": 0.2,
            "reward_model_fraction": 0.0,
        },
        "rollout": {"engine": "hf", "max_new_tokens": 8},
        "reward": {"name": "rules", "rules": [{"function": "actors.rewards.rules:length_target"}]},
        "evaluation": {"prompts": 4, "gold": "actors.rewards.rules:length_target"},
        "evaluate": {"tasks": [str(task)], "against": str(other), "require": {"sums/acc": ">= 2"}},
        "run": {"root": str(tmp_path)},
        "placement": {"wait_s": 5.0},
        "deadlines": of_a_run(),
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    output = finish(start(tmp_path / "config.yaml", cluster, "tasks"), code=3)
    metrics = read_json(tmp_path / "tasks" / "evaluate" / "result.json")["metrics"]
    assert metrics["sums/acc"] == pytest.approx(accuracy(base))
    assert metrics["sums/acc_against"] == pytest.approx(accuracy(other))
    assert "required >= 2" in output
