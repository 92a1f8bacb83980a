"""Scores, labels, published feedback, and documents."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.data.canonical import ranking_row
from orchestrator.data.kinds import DOCUMENTS, LABELS, RANKINGS, SCORES
from orchestrator.data.readers import read_all
from orchestrator.data.records import Message
from orchestrator.data.rows import text_rows
from orchestrator.errors import DataError
from tests.unit.orchestrator.data.test_demonstrations import TREE, flat, write

ASKED = (Message("user", "q"),)


def test_a_score_of_zero_is_data_and_null_is_left_out_and_counted(tmp_path: Path) -> None:
    rows = [{"user_input": "q", "completion": str(score), "score": score} for score in (5, 0, None, 0.5, -1)]
    records, report = read_all(SCORES, write(tmp_path, *rows))
    assert [(record.messages, record.reply, record.score) for record in records] == [
        (ASKED, "5", 5.0),
        (ASKED, "0", 0.0),
        (ASKED, "0.5", 0.5),
        (ASKED, "-1", -1.0),
    ]
    assert (report.format, report.left_out) == ("scored", {"replies without a score": 1})
    assert len({record.id for record in records}) == 1
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert read_all(SCORES, tmp_path / "rows.parquet")[0] == records


@pytest.mark.parametrize("key", ["score", "rating", "stars"])
def test_stars_are_scores(tmp_path: Path, key: str) -> None:
    rows = [{"prompt": "q", "response": f"a{stars}", key: stars} for stars in range(1, 6)]
    records, _ = read_all(SCORES, write(tmp_path, *rows))
    assert [record.score for record in records] == [1, 2, 3, 4, 5]


def test_labels_are_true_or_false(tmp_path: Path) -> None:
    turn = [{"role": "assistant", "content": "b"}]
    rows: list[Any] = [
        {"prompt": "q", "completion": "a", "label": True},
        {"prompt": [{"role": "user", "content": "q"}], "completion": turn, "label": False},
        {"prompt": "q", "completion": "a", "label": True},
    ]
    records, report = read_all(LABELS, write(tmp_path, *rows))
    assert [(record.messages, record.reply, record.label) for record in records] == [
        (ASKED, "a", True),
        (ASKED, "b", False),
    ]
    assert report.left_out == {"already read": 1}


def test_ranked_replies_of_a_tree_come_best_first(tmp_path: Path) -> None:
    for rows in ([TREE], flat(TREE)):
        (record,), report = read_all(RANKINGS, write(tmp_path, *rows))
        assert (record.messages, record.replies) == (ASKED, ("c", "a"))
        assert report.left_out == {"replies without a rank of their own": 1, "messages that were deleted": 1}


def test_completions_of_ultrafeedback_are_scores_and_a_ranking(tmp_path: Path) -> None:
    completions = [
        {"response": text, "overall_score": score} for text, score in zip("abcde", (3, 0, 8, None, 3.0), strict=True)
    ]
    path = write(tmp_path, {"source": "x", "instruction": "q", "completions": completions})
    scores, score_report = read_all(SCORES, path)
    assert [(record.reply, record.score) for record in scores] == [("a", 3), ("b", 0), ("c", 8), ("e", 3)]
    (ranking,), report = read_all(RANKINGS, path)
    assert (ranking.messages, ranking.replies, ranking.scores) == (ASKED, ("c", "a", "b"), (8, 3, 0))
    assert score_report.left_out == {"replies without a score": 1}
    assert report.left_out == {"replies without a score": 1, "replies with the score of another": 1}


def test_helpsteer_prefers_the_first_reply_if_the_preference_is_negative(tmp_path: Path) -> None:
    context = [{"role": "user", "content": "q"}]
    three = [
        {"context": context, "response1": "a", "response2": "b", "overall_preference": value} for value in (-3, 2, 0)
    ]
    two = [{"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": value} for value in (-3, 2, 0)]
    for rows in (three, two):
        records, report = read_all(RANKINGS, write(tmp_path, *rows))
        assert [(record.messages, record.replies) for record in records] == [(ASKED, ("a", "b")), (ASKED, ("b", "a"))]
        assert [record.scores for record in records] == [(3, 0), (2, 0)]
        assert (report.format, report.left_out) == ("helpsteer", {"with equal replies": 1})


PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
HH = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
RANKING = {"prompt": "q", "replies": ["a", "b", "a", "c"]}


@pytest.mark.parametrize(
    ("row", "scores"),
    [
        (PAIR, ()),
        ({**PAIR, "margin": None}, ()),
        ({**PAIR, "margin": 0}, (0, 0)),
        ({**PAIR, "margin": 2 / 3}, (2 / 3, 0)),
        ({**PAIR, "score_chosen": 8.5, "score_rejected": 6}, (8.5, 6)),
        ({**PAIR, "score_chosen": 8.5, "score_rejected": 8.5}, (8.5, 8.5)),
        ({**PAIR, "score_chosen": 8.5}, ()),
        ({**PAIR, "margin": 1, "score_chosen": 3, "score_rejected": 0}, (1, 0)),
        ({**PAIR, "chosen": [{"role": "assistant", "content": "a"}], "margin": 3}, (3, 0)),
        ({**HH, "margin": 1}, (1, 0)),
        (RANKING, ()),
        ({**RANKING, "margin": 0.5}, (1.5, 1, 0)),  # the reply that occurs twice keeps its better place
        ({**RANKING, "scores": [4, 4, 2, -1]}, (4, 4, -1)),
        ({**RANKING, "scores": None, "margin": None}, ()),
    ],
)
def test_rows_can_say_how_much_better_a_reply_is(
    tmp_path: Path, row: dict[str, Any], scores: tuple[float, ...]
) -> None:
    (record,), _ = read_all(RANKINGS, write(tmp_path, row))
    assert record.scores == pytest.approx(scores)
    assert len(record.scores) in (0, len(record.replies))
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    assert read_all(RANKINGS, tmp_path / "rows.parquet")[0] == (record,)
    again, _ = read_all(RANKINGS, write(tmp_path, ranking_row(record)))
    assert again == (record,)


def test_every_pair_of_a_row_has_its_margin(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": ["a", "b"], "rejected": ["c"], "margin": 2}
    records, _ = read_all(RANKINGS, write(tmp_path, row))
    assert [(record.replies, record.scores) for record in records] == [(("a", "c"), (2, 0)), (("b", "c"), (2, 0))]


def test_a_repeated_pair_is_one_whatever_its_margin(tmp_path: Path) -> None:
    records, report = read_all(RANKINGS, write(tmp_path, {**PAIR, "margin": 2}, {**PAIR, "margin": 1}, PAIR))
    assert [record.scores for record in records] == [(2, 0)] and report.left_out == {"already read": 2}


def test_prompts_of_helpsteer_hold_turns(tmp_path: Path) -> None:
    prompt = "Hi\n<extra_id_1>Assistant\nHello\n<extra_id_1>User\nA joke?"
    (record,), report = read_all(SCORES, write(tmp_path, {"prompt": prompt, "response": "a", "helpfulness": 0}))
    assert [(turn.role, turn.content) for turn in record.messages] == [
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "A joke?"),
    ]
    assert (report.format, record.score) == ("helpsteer", 0.0)


def test_documents_are_rows_of_text(tmp_path: Path) -> None:
    records, report = read_all(DOCUMENTS, write(tmp_path, {"text": "一\n"}, {"text": ""}, {"text": "two", "id": 2}))
    assert [record.text for record in records] == ["一\n", "two"]
    assert records[1].id == "2" and report.left_out == {"empty documents": 1}


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lambda data: pa.compress(data, "zstd", asbytes=True)])
def test_a_text_file_is_cut_between_lines_and_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack: Any
) -> None:
    monkeypatch.setattr(text_rows, "PIECE_BYTES", 12)
    text = "First line\nsecond\nthird 字\n<|endoftext|>\nAnother.\n<|endoftext|>\n\n"
    path = tmp_path / "corpus"
    path.write_bytes(pack(text.encode()))
    records, report = read_all(DOCUMENTS, path)
    assert [record.text for record in records] == ["First line\nsecond\n", "third 字\n", "Another.\n"]
    assert (report.format, report.num_rows) == ("plain", 3)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "is empty"),
        (b"\n \n", "0 records from 0 rows"),
        (b"fine\n\xff\n", "line 2 is not UTF-8 text"),
        (b"x" * 2**23, "line 1 is longer than 8 MiB"),
        (b"PK\x03\x04", "is a zip archive: unpack it"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ],
)
def test_faults_of_a_text_file(tmp_path: Path, data: bytes, fault: str) -> None:
    path = tmp_path / "corpus.txt"
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_all(DOCUMENTS, path)
    assert fault in str(caught.value) and str(path) in str(caught.value)


def test_text_that_begins_like_json_is_read_when_its_format_is_given(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    for text, format in (("[Chapter 1]\nIt was dark.\n", "auto"), ("{sic}\nIt was dark.\n", "plain")):
        path.write_text(text, encoding="utf-8")
        assert [record.text for record in read_all(DOCUMENTS, path, format)[0]] == [text]
    with pytest.raises(DataError, match=r"(?s)row 1: not JSON.*demonstrations\.format.*plain"):
        read_all(DOCUMENTS, path)
