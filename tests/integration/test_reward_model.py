"""The reward-model stage on Ray Train, with a model of two layers."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import ray
import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from actors.rewards.model import RewardModel
from actors.text.conversations import load_chat, reward_chat
from actors.training.ranked_tokens import JudgedRecord, RankedTokens
from jobs.prepare import start_chat
from jobs.stages.work.reward_model import RewardModelResult, train_reward_model
from orchestrator.config.config import Config
from orchestrator.config.loader import config_from_tree
from orchestrator.data.records import Message, RankingRecord, ScoredRecord
from orchestrator.errors import CapacityError, DataError, NonFiniteError
from orchestrator.run.storage import read_json, sha256
from orchestrator.watching.telemetry import Telemetry, read_lines
from tests.deadlines import of_a_run
from tests.integration.pipelines import finish, require_equal_after_a_kill, start
from tests.rows import store_records
from tests.tiny import CHATML, tiny_llama, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
_MOODS = ("kind", "plain", "rude")


class _Holder:
    def here(self) -> bool:
        return True


def _records(count: int) -> list[RankingRecord]:
    """Three replies per prompt; the last word determines the rank."""
    return [
        RankingRecord(
            f"p{number}",
            (Message("user", f"Say something about number {number}."),),
            tuple(f"It is {number * 7 % 13}, {mood}" for mood in _MOODS),
        )
        for number in range(count)
    ]


def _config(base: Path, folder: Path, **stage: Any) -> Config:
    settings = {"learning_rate": 3e-3, "records_per_batch": 4, "max_length": 64, "epochs": 2, "cpus_per_rank": 1}
    return config_from_tree(
        {
            "stages": ["reward_model"],
            "model": {"path": str(base), "dtype": "float32", "max_length": 128},
            "preferences": {"path": "given-in-the-test"},
            "run": {"root": str(folder)},
            "placement": {"wait_s": 5.0},
            "deadlines": of_a_run(),
            "reward_model": settings | stage,
        },
        source="test",
    )


def _train(
    config: Config,
    folder: Path,
    records: Sequence[JudgedRecord],
    held_out: Sequence[JudgedRecord],
    on_line: Callable[[str], None] = lambda text: None,
) -> tuple[RewardModelResult, list[dict[str, Any]], list[str]]:
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        on_line(text)

    async def run(telemetry: Telemetry) -> RewardModelResult:
        chat, longest = start_chat(config), config.reward_model.max_length
        train = RankedTokens(chat, longest, heads=config.reward_model.heads, seed=config.run.seed)
        tokens = train, RankedTokens(chat, longest)
        data = await store_records(records, held_out, tokens, folder / ".reward-model.rows")
        return await train_reward_model(config, data, folder / "reward-model", telemetry, say)

    with Telemetry(folder, "test", 1, stage="reward_model") as telemetry:
        result = asyncio.run(run(telemetry))
    return result, read_lines(folder / "metrics.jsonl"), said


@pytest.fixture(scope="module")
def trained(
    cluster: str, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RewardModelResult, list[dict[str, Any]], list[str]]:
    folder = tmp_path_factory.mktemp("run")
    records = _records(44)
    return _train(_config(base, folder), folder, records[:32], records[32:])


def test_it_learns_to_order_replies_it_has_not_seen(trained: Any) -> None:
    result, lines, said = trained
    assert result.num_pairs == 12 * 3
    assert result.held_out_accuracy > 0.9
    assert result.kendall_tau > 0.8
    assert result.interval[0] < result.held_out_accuracy <= result.interval[1]
    assert "held-out pairs in order" in result.describe()
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["step"] for line in steps] == list(range(result.optimizer_steps)) == list(range(16))
    assert steps[-1]["metrics"]["reward_model/loss"] < steps[0]["metrics"]["reward_model/loss"]
    rates = [line["metrics"]["reward_model/learning_rate"] for line in steps]
    assert rates[1] == pytest.approx(3e-3) and rates[0] < rates[1] > rates[-1] > 0
    (evaluation,) = (line for line in lines if line["kind"] == "evaluation")
    assert evaluation["metrics"]["reward_model/held_out_accuracy"] == result.held_out_accuracy
    assert said[-1].startswith("reward model 16/16")


def test_transformers_loads_it_and_padding_changes_no_score(trained: Any) -> None:
    result, _, _ = trained
    folder = Path(result.path)
    chat = load_chat(folder)
    tokenizer = chat.tokenizer
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    record = _records(1)[0]
    transcripts = [chat.reply(record.messages, reply) for reply in (*record.replies, "It is 1, rude, rude")]
    reward = RewardModel(
        folder, chat, dtype=torch.float32, device=torch.device("cpu"), micro_batch_tokens=512, normalise=True
    )
    ours = reward.head_scores(transcripts)[:, 0].tolist()
    padded = tokenizer.pad({"input_ids": [t.tokens.tolist() for t in transcripts]}, return_tensors="pt")
    with torch.no_grad():
        theirs = model(**padded).logits[:, 0].tolist()
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert ours[0] > ours[1] > ours[2]
    assert model.config.num_labels == 1 and tokenizer.chat_template


def test_a_base_of_another_vocabulary_is_scored_as_it_was_trained(cluster: str, base: Path, tmp_path: Path) -> None:
    """The base model has its own template: it ignores the policy's template but uses the system prompt."""
    other = tiny_llama(tmp_path / "other")
    own = tiny_tokenizer(chat_template=CHATML.replace("<|im_start|>", "<s>"))
    own.add_tokens(["<more>"])
    own.save_pretrained(other)
    (tmp_path / "policy.jinja").write_text(CHATML.replace("<|im_start|>", "</s>"))
    config = _config(base, tmp_path, epochs=1)
    stage = config.reward_model.model_copy(update={"base": str(other)})
    model = config.model.model_copy(
        update={"system_prompt": "Be kind.", "chat_template": tmp_path / "policy.jinja", "today": date(2025, 2, 3)}
    )
    _train(config.model_copy(update={"model": model, "reward_model": stage}), tmp_path, _records(12), _records(2))
    folder = tmp_path / "reward-model"
    assert json.loads((folder / "conversation.json").read_text()) == {
        "system_prompt": "Be kind.", "today": "2025-02-03", "closing": [0], "stops": [0],
    }  # fmt: skip
    chat = reward_chat(folder, load_chat(base))
    record = _records(1)[0]
    assert chat.text(chat.reply(record.messages, record.replies[0]).tokens) == (
        "<s>system\nBe kind.<|im_end|>\n<s>user\nSay something about number 0.<|im_end|>\n<s>assistant\n"
        "It is 0, kind<|im_end|>"
    )


def test_statistics_of_training_replies_are_recorded(trained: Any) -> None:
    result, _, _ = trained
    folder = Path(result.path)
    stats = json.loads((folder / "reward_stats.json").read_text())
    assert stats == {"mean": result.score_mean, "std": result.score_std, "count": 32 * 3}
    assert stats["std"] > 0
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("loss", ["regression", "ordinal"])
def test_scores_of_single_replies_are_learned(cluster: str, base: Path, tmp_path: Path, loss: str) -> None:
    stars = (5.0, 3.0, 1.0)
    records = [
        ScoredRecord(record.id, record.messages, reply, score)
        for record in _records(44)
        for reply, score in zip(record.replies, stars, strict=True)
    ]
    config = _config(base, tmp_path, loss={"name": loss}, epochs=4, records_per_batch=12)
    result, lines, said = _train(config, tmp_path, records[:96], records[96:])
    errors = [line["metrics"]["reward_model/absolute_error"] for line in lines if line["kind"] == "step"]
    assert errors[-1] < errors[0] / 2
    assert result.held_out_accuracy is not None and result.held_out_accuracy > 0.9
    assert result.accuracy is None and result.calibration.length_correlation is not None
    assert "absolute error" in said[-1]


def test_two_workers_learn_what_one_learns(cluster: str, base: Path, tmp_path: Path) -> None:
    records = _records(12)
    losses = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        config = _config(base, folder, ranks=workers, records_per_batch=3, epochs=1, micro_batch_tokens=200)
        _, lines, _ = _train(config, folder, records, [])
        losses.append([line["metrics"]["reward_model/loss"] for line in lines])
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def _kill_a_worker() -> None:
    children = psutil.Process().children(recursive=True)
    max((p for p in children if "RayTrainWorker" in "".join(p.cmdline())), key=lambda p: p.pid).kill()


@pytest.mark.parametrize(("workers", "heads"), [pytest.param(1, 1, marks=pytest.mark.variant), (2, 3)])
def test_killed_workers_are_replaced_and_change_no_bit(
    cluster: str, base: Path, tmp_path: Path, workers: int, heads: int
) -> None:
    """Twice: near the beginning, and in the middle, just after a checkpoint."""

    def kill(text: str) -> None:
        if text.startswith(("reward model 8/160", "reward model 80/160")):
            _kill_a_worker()

    runs = []
    for name, on_line in (("whole", lambda text: None), ("killed", kill)):
        (tmp_path / name).mkdir()
        config = _config(base, tmp_path, records_per_batch=1, ranks=workers, heads=heads, checkpoint_every_steps=10)
        runs.append(_train(config, tmp_path / name, _records(80), _records(2), on_line))
    (whole, whole_lines, _), (killed, killed_lines, said) = runs
    losses = [[line["metrics"].get("reward_model/loss") for line in lines] for lines in (whole_lines, killed_lines)]
    assert [line["step"] for line in killed_lines if line["kind"] == "step"] == list(range(160))
    assert losses[0] == losses[1]
    assert replace(killed, seconds=whole.seconds, path=whole.path) == whole
    assert (whole.heads is None) == (heads == 1) and (whole.heads is None or len(whole.heads.accuracies) == heads)
    weights = [sha256(Path(result.path) / "model.safetensors") for result in (whole, killed)]
    assert weights[0] == weights[1]
    again = [int(text.split()[5]) for text in said if "continues after step" in text]
    assert len(again) + sum("starts again" in text for text in said) == 2
    assert again[-1] >= 70, "steps before a checkpoint were learned again"
    assert len([text for text in said if "reward model 8/160" in text]) == 1


def test_a_driver_that_is_killed_and_started_again_continues_the_training(
    cluster: str, base: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"Say {n}.", "chosen": f"It is {n}, kind", "rejected": f"It is {n}, rude"} for n in range(160)]
    (tmp_path / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = [f"preferences.path={tmp_path / 'preferences.jsonl'}", "preferences.held_out=10", "reward_model.epochs=2"]
    keys += ["reward_model.records_per_batch=1", "reward_model.checkpoint_every_steps=20"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(_config(base, tmp_path).model_dump(mode="json")))

    killed_folder = require_equal_after_a_kill(
        tmp_path / "config.yaml", cluster, keys, made="reward-model", result="reward_model.json", num_steps=300
    )
    assert not list(killed_folder.glob(".reward-model*"))


def test_an_ensemble_is_trained_and_scores_replies_with_its_disagreement(
    cluster: str, base: Path, tmp_path: Path
) -> None:
    moods = {"kind": 3, "plain": 1, "rude": 0}
    rows = [
        {"prompt": f"Say {n}.", "replies": [f"It is {n}, {mood}" for mood in moods], "scores": list(moods.values())}
        for n in range(60)
    ]
    replies = [{"prompt": "Say 70.", "completion": f"It is 70, {mood}"} for mood in moods]
    for name, content in (("preferences", rows), ("replies", replies)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    tree = _config(base, tmp_path, heads=3, epochs=4, loss={"name": "pairwise", "margin": 0.5}).model_dump(mode="json")
    tree["preferences"] = {"path": str(tmp_path / "preferences.jsonl"), "held_out": 10}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    keys = ["stages=[reward_model,score]", f"score.path={tmp_path / 'replies.jsonl'}", f"run.cache={tmp_path}"]
    output = finish(start(tmp_path / "config.yaml", cluster, "run", *keys))
    assert re.search(r"3 heads, alone \S+% to \S+% in order, disagreeing by", output)
    heads = read_json(tmp_path / "run" / "reward_model.json")["heads"]
    assert len(heads["accuracies"]) == 3 and heads["right"] > 0
    scored = pq.read_table(tmp_path / "run" / "scores.parquet")
    parts = [dict(found) for found in scored["reward_parts"].to_pylist()]
    rewards = scored["reward"].to_pylist()
    assert rewards == sorted(rewards, reverse=True) and len(set(rewards)) == 3
    stats = read_json(tmp_path / "run" / "reward-model" / "reward_stats.json")
    assert [found["model"] for found in parts] == pytest.approx(
        [reward * stats["std"] + stats["mean"] for reward in rewards], rel=1e-4
    )
    assert all(found["disagreement"] > 0 for found in parts)


def test_a_loss_that_is_not_a_number_stops_it_and_leaves_no_model(cluster: str, base: Path, tmp_path: Path) -> None:
    broken = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    with torch.no_grad():
        broken.score.weight.fill_(float("nan"))
    broken.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "broken")
    with pytest.raises(NonFiniteError, match="epoch 0, batch 0"):
        _train(_config(tmp_path / "broken", tmp_path), tmp_path, _records(8), [])
    assert not (tmp_path / "reward-model").exists()


def test_an_unfit_base_model_is_named(cluster: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="config.json"):
        _train(_config(tmp_path / "empty", tmp_path), tmp_path, _records(4), [])


def test_more_workers_than_the_cluster_has_room_for_fail_at_once(cluster: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match="reward_model wants 3"):
        _train(_config(base, tmp_path, ranks=3), tmp_path, _records(4), [])


def test_resources_that_others_hold_are_not_waited_for_for_ever(cluster: str, base: Path, tmp_path: Path) -> None:
    holder = ray.remote(num_cpus=2)(_Holder).remote()
    ray.get(holder.here.remote())
    with pytest.raises(CapacityError, match=r"placement\.wait_s"):
        _train(_config(base, tmp_path), tmp_path, _records(4), [])
    ray.kill(holder)
