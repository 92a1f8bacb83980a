"""What `rlhf data inspect` shows: counts, rejected rows, token lengths, samples with learned tokens marked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.text.conversations import Chat, chat_of
from jobs.datasets import inspection
from jobs.datasets.inspection import MEASURED, coloured, histogram, inspect, sample
from jobs.datasets.written import Written, written
from orchestrator.config.config import Config
from orchestrator.data.kinds import KINDS
from orchestrator.data.streams import Stream
from orchestrator.errors import DataError
from tests.tiny import CHATML, tiny_tokenizer
from tests.unit.orchestrator.data.test_bad_rows import GOOD
from tests.unit.orchestrator.data.test_demonstrations import TURNS, write

REFUSING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}" + CHATML


@pytest.fixture
def chat() -> Chat:
    return chat_of(tiny_tokenizer(chat_template=CHATML))


def marked(chat: Chat, part: Written) -> str:
    return coloured(chat, part, marks=True).plain


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_record_is_written_and_its_replies_are_marked(tmp_path: Path, chat: Chat, kind: str) -> None:
    row = next(row for row in GOOD[kind].values() if row)
    (record,) = Stream(KINDS[kind], write(tmp_path, row))
    parts = written(chat, record)
    assert len(parts) == (2 if kind == "preferences" else 1)
    for part in parts:
        assert len(part.tokens) == len(part.learn) > 0
        assert part.learn.any() == (kind != "prompts") and part.learn.all() == (kind == "documents")


def test_learned_tokens_are_the_replies_with_their_closings(tmp_path: Path, chat: Chat) -> None:
    turns = [*TURNS, {"role": "user", "content": "more"}, {"role": "assistant", "content": "end"}]
    (record,) = Stream(KINDS["demonstrations"], write(tmp_path, {"messages": turns}))
    (part,) = written(chat, record)
    assert marked(chat, part) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n⟦a<|im_end|>⟧\n"
        "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n⟦end<|im_end|>⟧"
    )


def test_a_long_record_is_cut_and_says_how_much_is_missing(chat: Chat) -> None:
    tokens = np.zeros(inspection.SHOWN_TOKENS + 5, dtype=np.int32)
    part = Written("", tokens, np.ones(len(tokens), dtype=np.bool_))
    assert marked(chat, part).endswith("⟧ … and 5 tokens more")


def test_the_histogram_has_a_line_per_power_of_two() -> None:
    assert [line.split() for line in histogram([1, 5, 6, 7, 17, 30])] == [
        ["1", "to", "1", "1", "█" * 13],
        ["2", "to", "3", "0"],
        ["4", "to", "7", "3", "█" * 40],
        ["8", "to", "15", "0"],
        ["16", "to", "31", "2", "█" * 27],
    ]


def test_the_sample_is_evenly_spaced_and_keeps_what_was_read_before_a_fault() -> None:
    found, problem = sample(range(MEASURED * 10))
    assert problem is None and len(found) == MEASURED and found == sorted(set(found))
    assert abs(sum(found) / len(found) / (MEASURED * 10) - 0.5) < 0.05

    def broken() -> Iterator[int]:
        yield from range(3)
        raise DataError("row 4")

    assert sample(broken())[0] == [0, 1, 2] and str(sample(broken())[1]) == "row 4"


def run(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], template: str = CHATML
) -> tuple[str, str]:
    """What inspect prints, and its error."""
    monkeypatch.setattr(inspection, "policy_chat", lambda config: chat_of(tiny_tokenizer(chat_template=template)))
    error = ""
    try:
        inspect(path, None, "auto", Config())
    except DataError as problem:
        error = str(problem)
    return capsys.readouterr().out, error


def test_a_good_file_is_counted_measured_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": f"r{number}", "prompt": "q" * number, "response": "a"} for number in range(1, 8)]
    shown, error = run(write(tmp_path, *rows, rows[0]), monkeypatch, capsys)
    assert not error
    for part in (
        "demonstrations (--as prompts would do too)",
        "(prompt): 7 records from 8 rows; left out: 1 already read",
        "tokens of a record: median ",
        "16 to 31",
        "tokens learned or scored: 2 a record",
        "⟦a<|im_end|>⟧",
    ):
        assert part in shown
    assert shown.count("⟦a<|im_end|>⟧") == 3


def test_scores_of_ranked_replies_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    shown, _ = run(write(tmp_path, {**row, "margin": 1.5}), monkeypatch, capsys)
    assert "reply 1, score 1.5" in shown and "reply 2, score 0" in shown
    shown, _ = run(write(tmp_path, row), monkeypatch, capsys)
    assert "reply 1" in shown and "score" not in shown.partition("reply 1")[2]


def test_rejected_rows_are_listed_with_reasons_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[Any] = [{"prompt": "q", "response": "a"}, *[{"prompt": "q", "response": 3}] * 25]
    shown, error = run(write(tmp_path, *rows), monkeypatch, capsys)
    assert "rejected row 2: 'response' must be text or a list of texts, found a number" in shown
    assert "and 5 more" in shown and shown.count("rejected row") == 20 and "⟦a" in shown
    assert "25 of 26 rows are bad" in error


def test_records_that_the_template_refuses_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, {"messages": TURNS, "id": "x"}, {"messages": TURNS[1:]})
    shown, error = run(path, monkeypatch, capsys, REFUSING)
    assert "refuses 1 of 2 records, such as 'x'" in shown and "no system role here" in shown and not error


def test_a_broken_array_shows_what_came_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file.json"
    path.write_text(json.dumps([{"prompt": "q"}])[:-1] + ", {")
    shown, error = run(path, monkeypatch, capsys)
    assert "1 records from 1 rows" in shown and "row 2 is not JSON" in error


def test_each_source_of_a_mixture_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, {"prompt": "q", "response": "a"}).rename(tmp_path / "a.jsonl")
    write(tmp_path, {"messages": TURNS}).rename(tmp_path / "b.jsonl")
    (tmp_path / "mixture.yaml").write_text("sources: [{path: a.jsonl}, {path: b.jsonl, weight: 2}]")
    shown, error = run(tmp_path / "mixture.yaml", monkeypatch, capsys)
    assert "a.jsonl (prompt): 1 records" in shown and "b.jsonl (messages): 1 records" in shown and not error
