"""Published data sets, if available."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from orchestrator.data.kinds import DEMONSTRATIONS, PROMPTS, RANKINGS
from orchestrator.data.readers import read_all

FOLDER = Path(__file__).parents[5] / "shared" / "data"
pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"{FOLDER} is absent: it holds samples of published data sets"
)


def test_gsm8k_questions_keep_their_answers() -> None:
    records, report = read_all(PROMPTS, FOLDER / "gsm8k-train.jsonl.gz")
    assert (report.format, report.num_records) == ("question", 4000)
    assert all("####" in record.meta["answer"] for record in records)


def test_hh_rlhf_gives_prompts_and_pairs_that_end_with_the_user() -> None:
    prompts, prompt_report = read_all(PROMPTS, FOLDER / "hh-rlhf-harmless.jsonl.gz")
    pairs, pair_report = read_all(RANKINGS, FOLDER / "hh-rlhf-harmless.jsonl.gz")
    assert (prompt_report.num_records, prompt_report.left_out) == (1798, {"already read": 2})
    assert (pair_report.num_records, pair_report.left_out) == (1800, {})
    for record in [*prompts, *pairs]:
        roles = [message.role for message in record.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
    assert {prompt.id for prompt in prompts} == {pair.id for pair in pairs}


def test_gsm8k_answers_are_replies() -> None:
    records, report = read_all(DEMONSTRATIONS, FOLDER / "gsm8k-train.jsonl.gz")
    assert (report.format, report.num_records, report.left_out) == ("question", 4000, {})
    assert all("####" in record.messages[1].content for record in records)


def test_sharegpt_loses_no_turn() -> None:
    path = FOLDER / "sharegpt-fastchat.json.gz"
    records, report = read_all(DEMONSTRATIONS, path)
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = json.load(file)
    assert (report.format, report.num_records, report.left_out) == ("sharegpt", 300, {})
    texts = [[turn["value"] for turn in row["conversations"]] for row in rows]
    assert [[turn.content for turn in record.messages] for record in records] == texts
    assert sum(turn.role == "assistant" for record in records for turn in record.messages) == 601


def test_seeds_are_conversations() -> None:
    records, report = read_all(DEMONSTRATIONS, FOLDER / "self-instruct-seeds.jsonl")
    assert (report.format, report.num_records, report.left_out) == ("seeds", 175, {})
    assert records[0].id == "seed_task_0"


def test_every_reply_of_the_oasst_trees_is_learned_and_every_prompt_asked() -> None:
    path = FOLDER / "oasst-trees-en.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        nodes = [json.loads(line)["prompt"] for line in file]
    assert len(nodes) == 60
    for node in nodes:
        nodes.extend(node["replies"])
    texts = {role: {node["text"] for node in nodes if node["role"] == role} for role in ("prompter", "assistant")}
    records, report = read_all(DEMONSTRATIONS, path)
    assert report.num_rows == len({record.id for record in records}) == 60
    assert {t.content for record in records for t in record.messages if t.role == "assistant"} == texts["assistant"]
    leaves = sum(not node["replies"] for node in nodes)
    assert leaves == report.num_records + report.left_out["already read"]
    prompts, prompt_report = read_all(PROMPTS, path)
    assert {record.text for record in prompts} == texts["prompter"]
    ranked, ranked_report = read_all(RANKINGS, path)
    assert {reply for record in ranked for reply in record.replies} == {
        reply["text"] for node in nodes for reply in node["replies"] if reply.get("rank") is not None
    }
    assert ranked_report.num_records == 122 and ranked_report.left_out["replies without a rank of their own"] == 31
    assert prompt_report.num_records == sum(node["role"] == "prompter" for node in nodes) == 282
