"""Replies of a file become the table that an engine would have made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from actors.text.conversations import chat_of
from jobs.stages.sample import SAMPLES
from jobs.stages.score import SCORES, ScoreSamples
from jobs.stages.work.data.replies import read_replies, replies_table
from orchestrator import schema
from orchestrator.config.config import Config
from orchestrator.config.loader import config_from_tree
from orchestrator.errors import DataError
from tests.tiny import tiny_tokenizer


def config_of(folder: Path, *rows: dict[str, Any]) -> Config:
    path = folder / "replies.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return config_from_tree({"score": {"path": str(path)}, "reward": {"path": "/m"}}, source="test")


def test_every_reply_is_a_row_in_the_order_of_the_file_with_its_other_fields(tmp_path: Path) -> None:
    config = config_of(
        tmp_path,
        {"prompt": "Why?", "completion": "Because 因为", "answer": 0},
        {"prompt": "How?", "completion": " so "},
        {"prompt": "Why?", "completion": "No."},
        {"prompt": "Why?", "completion": "No."},
    )
    records, report = read_replies(config)
    assert (report.num_rows, report.num_records) == (4, 3) and "already read" in report.summary()
    chat = chat_of(tiny_tokenizer())
    table = replies_table(records, chat)
    assert table.schema.equals(schema.ROLLOUT)
    rows = table.to_pylist()
    assert [row["response_text"] for row in rows] == ["Because 因为", " so ", "No."]
    assert [(row["row"], row["sample_index"]) for row in rows] == [(0, 0), (1, 0), (2, 1)]
    assert rows[0]["prompt_id"] == rows[2]["prompt_id"] != rows[1]["prompt_id"]
    meta = json.loads(rows[0]["meta"])
    assert meta["answer"] == 0 and meta["messages"] == [{"role": "user", "content": "Why?"}]
    for row in rows:
        assert row["finish_reason"] == "stop" and len(row["engine_logprobs"]) == len(row["response_tokens"])
        assert chat.text(row["response_tokens"]) == row["response_text"] + "<|im_end|>"
        assert chat.text(row["prompt_tokens"]).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("completion", [None, 3, ["x"]])
def test_a_row_without_a_reply_is_named(tmp_path: Path, completion: Any) -> None:
    config = config_of(tmp_path, {"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": completion})
    with pytest.raises(DataError, match="row 2: needs a reply as text in one of the fields completion"):
        read_replies(config)


def test_the_stage_needs_no_samples_and_makes_them_for_stages_after_it(tmp_path: Path) -> None:
    config = config_of(tmp_path, {"prompt": "a", "completion": "b"})
    assert ScoreSamples().reads(config) == ()
    assert [made.kind for made in ScoreSamples().makes(config)] == [SCORES, SAMPLES]
    assert ScoreSamples().inputs(config).files["score.path"] == config.score.path
