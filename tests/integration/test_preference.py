"""The stage preference on Ray Train, with a model of two layers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from actors.text.conversations import load_chat
from actors.training.preference import learns_prompts
from actors.training.ranked_tokens import JudgedRecord, RankedTokens
from jobs.prepare import policy_chat
from jobs.stages.work.preference import PreferenceResult, train_on_preferences
from orchestrator.config.config import Config
from orchestrator.config.loader import config_from_tree
from orchestrator.data.records import LabelledRecord, Message, RankingRecord
from orchestrator.run.storage import sha256
from orchestrator.watching.telemetry import Telemetry, read_lines
from tests.deadlines import of_a_run
from tests.integration.pipelines import require_equal_after_a_kill
from tests.rows import store_records

ROOT = Path(__file__).resolve().parents[2]
_MOODS = ("kind", "plain", "rude")


def _records(count: int) -> list[RankingRecord]:
    """Three replies each; the last word tells their rank."""
    return [
        RankingRecord(
            f"p{number}",
            (Message("user", f"Say something about number {number}."),),
            tuple(f"It is {number * 7 % 13}, {mood}" for mood in _MOODS),
        )
        for number in range(count)
    ]


def _labels(count: int) -> list[LabelledRecord]:
    """Every second reply is desirable; its last word tells so."""
    return [
        LabelledRecord(record.id, record.messages, record.replies[0 if number % 2 else 2], bool(number % 2))
        for number, record in enumerate(_records(count))
    ]


def _config(base: Path, folder: Path, **stage: Any) -> Config:
    settings = {"learning_rate": 1e-3, "records_per_batch": 4, "max_length": 64, "epochs": 2, "cpus_per_rank": 1}
    return config_from_tree(
        {
            "stages": ["preference"],
            "model": {"path": str(base), "dtype": "float32", "max_length": 128},
            "preferences": {"path": "given-in-the-test"},
            "run": {"root": str(folder)},
            "placement": {"wait_s": 5.0},
            "deadlines": of_a_run(),
            "preference": settings | stage,
        },
        source="test",
    )


def _train(
    config: Config,
    folder: Path,
    records: Sequence[JudgedRecord],
    held_out: Sequence[JudgedRecord],
    on_line: Callable[[str], None] = lambda text: None,
) -> tuple[PreferenceResult, list[dict[str, Any]], list[str]]:
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        on_line(text)

    async def run(telemetry: Telemetry) -> PreferenceResult:
        stage, chat = config.preference, policy_chat(config)
        train = RankedTokens(chat, stage.max_length, learns_prompts=learns_prompts(stage))
        tokens = train, RankedTokens(chat, stage.max_length)
        data = await store_records(records, held_out, tokens, folder / ".preferred.rows")
        return await train_on_preferences(config, data, folder / "preferred", telemetry, say)

    folder.mkdir(exist_ok=True)
    with Telemetry(folder, "test", 1, stage="preference") as telemetry:
        result = asyncio.run(run(telemetry))
    return result, read_lines(folder / "metrics.jsonl"), said


def _losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["metrics"]["preference/loss"] for line in lines if line["kind"] == "step"]


@pytest.mark.parametrize(
    "loss", ["dpo", *(pytest.param(loss, marks=pytest.mark.variant) for loss in ("ipo", "simpo", "orpo", "cpo"))]
)
def test_every_loss_of_pairs_orders_replies_that_it_has_not_seen(
    cluster: str, base: Path, tmp_path: Path, loss: str
) -> None:
    records = _records(44)
    config = _config(base, tmp_path, loss={"name": loss})
    result, lines, said = _train(config, tmp_path / "run", records[:32], records[32:])
    assert result.num_pairs == 12 * 3
    assert result.held_out_accuracy is not None and result.held_out_accuracy > 0.9
    losses = _losses(lines)
    assert len(losses) == result.optimizer_steps == 16
    assert losses[-1] < losses[0]
    (evaluation,) = (line for line in lines if line["kind"] == "evaluation")
    assert evaluation["metrics"]["preference/held_out_accuracy"] == result.held_out_accuracy
    assert said[-1].startswith("preference 16/16")
    assert [path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".")] == []


def test_kto_orders_single_replies_that_it_has_not_seen(cluster: str, base: Path, tmp_path: Path) -> None:
    records = _labels(72)
    config = _config(base, tmp_path, loss={"name": "kto"})
    result, lines, _ = _train(config, tmp_path / "run", records[:48], records[48:])
    assert result.num_pairs == 12 * 12
    assert result.held_out_accuracy is not None and result.held_out_accuracy > 0.9
    losses = _losses(lines)
    assert losses[0] == pytest.approx(0.5, abs=1e-5) and losses[-1] < 0.5


def test_the_first_loss_of_dpo_is_log_two_and_the_policy_is_an_ordinary_model(
    cluster: str, base: Path, tmp_path: Path
) -> None:
    result, lines, _ = _train(_config(base, tmp_path, epochs=4), tmp_path / "run", _records(32), [])
    assert _losses(lines)[0] == pytest.approx(0.693147, abs=1e-5)
    folder = Path(result.path)
    chat, record = load_chat(folder), _records(1)[0]
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (folder, base)]

    def logprob(model: Any, reply: Any) -> float:
        transcript = chat.reply(record.messages, reply)
        tokens = torch.tensor(transcript.tokens.tolist())
        with torch.no_grad():
            log_p = model(input_ids=tokens[None]).logits[0, :-1].log_softmax(-1)
        found = log_p.gather(-1, tokens[1:, None])[:, 0]
        return float(found[len(transcript.prompt_tokens) - 1 :].sum())

    kind, _, rude = record.replies
    margins = [logprob(model, kind) - logprob(model, rude) for model in models]
    assert margins[0] > margins[1] + 1.0


@pytest.mark.parametrize("loss", ["dpo", pytest.param("cpo", marks=pytest.mark.variant), "kto"])
def test_two_workers_learn_what_one_learns(cluster: str, base: Path, tmp_path: Path, loss: str) -> None:
    losses = []
    for workers, budget in ((1, 2048), (2, 200)):
        config = _config(
            base,
            tmp_path,
            ranks=workers,
            records_per_batch=3,
            epochs=1,
            micro_batch_tokens=budget,
            loss={"name": loss},
        )
        records = _labels(12) if loss == "kto" else _records(12)
        _, lines, _ = _train(config, tmp_path / str(workers), records, [])
        losses.append(_losses(lines))
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def _kill_a_worker() -> None:
    children = psutil.Process().children(recursive=True)
    max((p for p in children if "RayTrainWorker" in "".join(p.cmdline())), key=lambda p: p.pid).kill()


@pytest.mark.variant  # as workers of a reward model, which the suite kills
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_workers_are_replaced_and_change_no_bit(cluster: str, base: Path, tmp_path: Path, workers: int) -> None:
    """Twice: near the beginning, and in the middle, from where a checkpoint is near."""

    def kill(text: str) -> None:
        if text.startswith(("preference 8/160", "preference 80/160")):
            _kill_a_worker()

    runs = []
    for name, on_line in (("whole", lambda text: None), ("killed", kill)):
        config = _config(base, tmp_path, records_per_batch=1, ranks=workers, checkpoint_every_steps=10)
        runs.append(_train(config, tmp_path / name, _records(80), _records(2), on_line))
    (whole, whole_lines, _), (killed, killed_lines, said) = runs
    assert [line["step"] for line in killed_lines if line["kind"] == "step"] == list(range(160))
    assert _losses(whole_lines) == _losses(killed_lines)
    assert replace(killed, seconds=whole.seconds, path=whole.path) == whole
    weights = [sha256(Path(result.path) / "model.safetensors") for result in (whole, killed)]
    assert weights[0] == weights[1]
    again = [int(text.split()[4]) for text in said if "continues after step" in text]
    assert len(again) + sum("starts again" in text for text in said) == 2
    assert again[-1] >= 70, "what a checkpoint held was learned again"


@pytest.mark.variant
def test_a_driver_that_is_killed_and_started_again_continues_the_training(
    cluster: str, base: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"Say {n}.", "chosen": f"It is {n}, kind", "rejected": f"It is {n}, rude"} for n in range(160)]
    (tmp_path / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = [f"preferences.path={tmp_path / 'preferences.jsonl'}", "preferences.held_out=10", "preference.epochs=2"]
    keys += ["preference.records_per_batch=1", "preference.checkpoint_every_steps=20"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(_config(base, tmp_path).model_dump(mode="json")))

    require_equal_after_a_kill(
        tmp_path / "config.yaml", cluster, keys, made="preferred", result="preference.json", num_steps=300
    )
