"""All formats are read, errors name bad rows, and nothing is dropped silently."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.data.kinds import PROMPTS, RANKINGS
from orchestrator.data.readers import read_all
from orchestrator.data.records import Message
from orchestrator.data.rows import json_rows
from orchestrator.errors import DataError

ROWS: list[dict[str, Any]] = [{"id": f"p{i}", "prompt": f"Question {i}?", "answer": str(i)} for i in range(3)]
HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: A joke?\n\nAssistant:"


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _parquet_bytes(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def _jsonl_bytes(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _array_bytes(rows: list[dict[str, Any]]) -> bytes:
    return json.dumps(rows, indent=2).encode()


@pytest.mark.parametrize("encode", [_jsonl_bytes, _array_bytes, _parquet_bytes])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, lambda data: pa.compress(data, "zstd", asbytes=True)])
def test_every_kind_of_file_gives_the_same_records(
    tmp_path: Path, encode: Callable[[Any], bytes], pack: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "prompts"  # detected from the bytes, not from the name
    path.write_bytes(pack(encode(ROWS)))
    records, report = read_all(PROMPTS, path)
    assert [(r.id, r.messages, r.text, dict(r.meta)) for r in records] == [
        (f"p{i}", (Message("user", f"Question {i}?"),), f"Question {i}?", {"answer": str(i)}) for i in range(3)
    ]
    assert (report.format, report.num_rows, report.num_records, report.left_out) == ("prompt", 3, 3, {})


def test_a_file_uri_is_read_even_after_pathlib_has_folded_its_slashes(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", ROWS)
    assert len(read_all(PROMPTS, f"file://{path}")[0]) == 3
    assert len(read_all(PROMPTS, Path(f"file://{path}"))[0]) == 3


def test_a_json_array_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "CHUNK_BYTES", 7)
    path = tmp_path / "p.json"
    rows = [{"prompt": f'è\u2028 {i} \\ " ] , [ {{'} for i in range(50)]
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert [record.text for record in read_all(PROMPTS, path)[0]] == [row["prompt"] for row in rows]


@pytest.mark.parametrize(
    ("row", "name", "expected", "meta"),
    [
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "messages",
            ["a"],
            {},
        ),
        ({"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]}, "prompt", ["s", "a"], {}),
        ({"chosen": HH + " x", "rejected": HH + " y"}, "hh-rlhf", ["Hi", "Hello", "A joke?"], {}),
        ({"instruction": "Sum", "input": "1 2", "output": "3"}, "alpaca", ["Sum\n\n1 2"], {"output": "3"}),
        ({"instruction": "Sing", "input": "", "output": "la"}, "alpaca", ["Sing"], {"output": "la"}),
        ({"question": "1+1?", "answer": "#### 2"}, "question", ["1+1?"], {"answer": "#### 2"}),
    ],
)
def test_prompt_formats_are_told_by_their_fields(
    tmp_path: Path, row: dict[str, Any], name: str, expected: list[str], meta: dict[str, Any]
) -> None:
    for chosen_format in ("auto", name):
        (record,), report = read_all(PROMPTS, jsonl(tmp_path / "p.jsonl", [row]), chosen_format)
        assert report.format == name
        assert [message.content for message in record.messages] == expected
        assert (record.text, dict(record.meta)) == (expected[-1], meta)


@pytest.mark.parametrize(
    ("row", "name", "expected"),
    [
        ({"prompt": "q", "replies": ["a", "b", "c"], "gold": [3, 2, 1]}, "ranking", [("a", "b", "c")]),
        ({"prompt": "q", "replies": ["a", "b", "a"]}, "ranking", [("a", "b")]),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "pairwise", [("a", "b")]),
        ({"context": "q", "chosen": ["a", "b"], "rejected": ["c"]}, "pairwise", [("a", "c"), ("b", "c")]),
        (
            {
                "prompt": [{"role": "user", "content": "q"}],
                "chosen": [{"role": "assistant", "content": "a"}],
                "rejected": [{"role": "assistant", "content": "b"}],
            },
            "pairwise",
            [("a", "b")],
        ),
        ({"chosen": HH + " x", "rejected": HH + " y"}, "hh-rlhf", [("x", "y")]),
        ({"chosen": HH + " x", "rejected": HH + ""}, "hh-rlhf", [("x", "")]),
        (
            {
                "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
                "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}],
            },
            "hh-rlhf",
            [("a", "b")],
        ),
    ],
)
def test_preference_formats(tmp_path: Path, row: dict[str, Any], name: str, expected: list[tuple[str, ...]]) -> None:
    records, report = read_all(RANKINGS, jsonl(tmp_path / "p.jsonl", [row]))
    assert report.format == name
    assert [record.replies for record in records] == expected
    assert {record.messages[-1].role for record in records} == {"user"}


def test_bad_rows_are_named_together_with_file_and_row(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(
        b'{"prompt": "fine"}\n'
        b"\n"
        b'{"prompt": 3}\n'
        b'{"prompt": "x"\n'
        b'{"prompt": "\xff"}\n'
        b'["x"]\n'
        b'{"prompt": "never reached"}\n'
        b'{"text": "x"}\n'
    )
    with pytest.raises(DataError) as caught:
        read_all(PROMPTS, path)
    message = str(caught.value)
    assert str(path) in message and "prompts.format" in message
    for part in (
        "row 3: 'prompt' must be text or a list of {role, content}, found a number",
        "row 4: not JSON: ",
        "row 5: not UTF-8 text (byte 13 of the line)",
        "row 6: not an object with fields but a list",
        "row 8: field 'prompt' is missing; the fields are: text",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("rows", "format", "fault"),
    [
        ([{"prompt": ""}], "prompt", "'prompt' is empty"),
        ([{"messages": [{"role": "bot", "content": "x"}]}], "auto", "messages[0]: role must be one of"),
        ([{"messages": [{"role": "user", "content": None}]}], "auto", "content must be text, found null"),
        ([{"messages": [{"role": "assistant", "content": "x"}]}], "auto", "no user message"),
        ([{"chosen": "no turns", "rejected": HH}], "auto", "must be a transcript that starts with 'Human:'"),
        ([{"prompt": "\ud800"}], "auto", "half of a surrogate pair"),
        ([{"id": "a", "prompt": "x"}, {"id": "a", "prompt": "y"}], "auto", "id 'a' is already used by row 1"),
        ([{"id": 1.5, "prompt": "x"}], "auto", "'id' must be text or an integer"),
    ],
)
def test_faults_of_a_row(tmp_path: Path, rows: list[Any], format: str, fault: str) -> None:
    with pytest.raises(DataError, match="row 2" if len(rows) == 2 else "row 1") as caught:
        read_all(PROMPTS, jsonl(tmp_path / "p.jsonl", rows), format)
    assert fault in str(caught.value)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "is empty"),
        (b"\n \n", "0 records from 0 rows"),
        (b'{"question_text": "x"}\n', "fits no known format; its fields are: question_text"),
        (b'[{"prompt": "x"}', "the JSON array ends without ']'"),
        (b'[{"prompt": "x"} {"prompt": "y"}]', "row 1 is not followed by ',' or ']'"),
        (b'[{"prompt": "x"}, {"prompt" "y"}, {"prompt": "z"}, {"prompt": "z"}]', "row 2 is not JSON"),
        (b"[]", "0 records from 0 rows"),
        (b"PAR1 not really", "can't be read"),
        (gzip.compress(b'{"prompt": "x"}\n' * 1000, mtime=0)[:-9], "Truncated compressed stream"),
    ],
)
def test_faults_of_a_file(tmp_path: Path, content: bytes, fault: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_all(PROMPTS, path)
    assert fault in str(caught.value) and str(path) in str(caught.value)


def test_a_missing_file_and_an_unknown_format_are_data_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist: check the path"):
        read_all(PROMPTS, tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="can't be read"):
        read_all(PROMPTS, tmp_path)
    with pytest.raises(DataError, match="choose one of auto, ranking, pairwise, hh-rlhf"):
        read_all(RANKINGS, tmp_path, "csv")


def test_parquet_columns_of_a_wrong_type_are_bad_rows_and_dates_become_text(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"prompt": [1, 2]}), path)
    with pytest.raises(DataError, match=r"row 1: 'prompt' must be text[^\n]*\n  row 2: "):
        read_all(PROMPTS, path)
    pq.write_table(pa.table({"prompt": ["x"], "day": pa.array([0], pa.date32())}), path)
    assert read_all(PROMPTS, path)[0][0].meta == {"day": "1970-01-01"}


def test_duplicate_prompts_are_kept_once_and_counted(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}])
    records, report = read_all(PROMPTS, path)
    assert [record.text for record in records] == ["a", "b"]
    assert report.left_out == {"already read": 1}
    assert "2 records from 3 rows; left out: 1 already read" in report.summary()


def test_equal_and_incomparable_pairs_are_counted_not_fatal(tmp_path: Path) -> None:
    rows = [
        {"chosen": HH + " x", "rejected": HH + " y"},
        {"chosen": HH + " x", "rejected": HH + " x"},
        {"chosen": HH + " x\n\nHuman: more\n\nAssistant: z", "rejected": HH + " y"},
    ]
    records, report = read_all(RANKINGS, jsonl(tmp_path / "p.jsonl", rows))
    assert len(records) == 1
    assert sorted(report.left_out.values()) == [1, 1]


def test_neighbouring_turns_of_one_speaker_become_one_message(tmp_path: Path) -> None:
    row = {"chosen": HH + " x\n\nAssistant: and more", "rejected": HH + " y"}
    (record,), _ = read_all(RANKINGS, jsonl(tmp_path / "p.jsonl", [row]))
    assert record.replies == ("x\n\nand more", "y")


def test_ids_follow_from_the_messages_alone(tmp_path: Path) -> None:
    with_meta, _ = read_all(PROMPTS, jsonl(tmp_path / "a.jsonl", [{"prompt": "same", "answer": 1}]))
    as_messages, _ = read_all(
        PROMPTS, jsonl(tmp_path / "b.jsonl", [{"messages": [{"role": "user", "content": "same"}], "source": "x"}])
    )
    assert with_meta[0].id == as_messages[0].id == hashlib.sha256(b'[[["user","same"]]]').hexdigest()[:16]


def test_limit_stops_reading_before_a_bad_row(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", [*ROWS, {"nothing": 0}])
    assert read_all(PROMPTS, path, limit=3)[1].num_rows == 3
    with pytest.raises(DataError, match="row 4"):
        read_all(PROMPTS, path, limit=4)
