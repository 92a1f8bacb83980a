"""Converted files hold the same records, in the form that the readers detect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.datasets.conversion import convert
from jobs.datasets.kinds import kinds_of
from orchestrator.data.kinds import KINDS, PROMPTS
from orchestrator.data.readers import read_all
from orchestrator.data.streams import Stream
from orchestrator.errors import ConfigError, DataError
from tests.unit.orchestrator.data.test_bad_rows import GOOD
from tests.unit.orchestrator.data.test_demonstrations import TURNS, write

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"x": {"type": "number"}}}}]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {}}]}
USER = {"role": "user", "content": "q 一"}
BEGUN = [USER, {"role": "assistant", "content": "Well, "}]
MORE: dict[str, dict[str, Any]] = {
    "prompts": {"id": 7, "prompt": BEGUN, "answer": "5", "tests": [{"in": 1}], "tools": TOOLS},
    "demonstrations": {
        "messages": [USER, CALL, {"role": "tool", "content": "0", "name": "add"}, TURNS[2]],
        "tools": TOOLS,
    },
    "preferences": {"prompt": BEGUN, "replies": ["Well, a", "Well, b"]},
    "labels": {"prompt": [USER], "completion": CALL, "label": False, "tools": TOOLS},
    "scores": {"prompt": BEGUN, "completion": "a", "score": 0, "reasoning": 3},
    "documents": {"text": "一\n"},
}


def records(path: Path, kind: str, format: str = "auto") -> list[Any]:
    stream = Stream(KINDS[kind], path, format)
    found = list(stream)
    assert stream.report().num_records == len(found) > 0
    return found


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_file_holds_the_same_records(tmp_path: Path, kind: str, ending: str) -> None:
    rows = [(name, row) for name, row in GOOD[kind].items() if row] + [("auto", MORE[kind])]
    for format, row in rows[-2:] if ending == "parquet" else rows:
        path, out = write(tmp_path, row), tmp_path / f"out.{ending}"
        convert(path, out, None, kind, format)
        assert records(out, kind) == records(path, kind, format)


def test_a_file_of_different_rows_becomes_one_parquet_file(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "answer": 1}, MORE["prompts"] | {"answer": 0.5}, {"prompt": "b", "level": "easy"}]
    path, out = write(tmp_path, *rows), tmp_path / "out"
    convert(path, out, "parquet", "prompts", "auto")
    assert [record.meta for record in read_all(PROMPTS, out)[0]] == [
        {"answer": 1.0},
        {"answer": 0.5, "tests": [{"in": 1}]},
        {"level": "easy"},
    ]


def test_fields_that_a_row_needs_for_itself_get_another_name(tmp_path: Path) -> None:
    path, out = write(tmp_path, {"messages": TURNS, "prompt": "q", "source": "x"}), tmp_path / "out.jsonl"
    convert(path, out, None, "prompts", "auto")
    (before,), _ = read_all(PROMPTS, path)
    (after,), report = read_all(PROMPTS, out)
    assert (report.format, after.messages) == ("prompt", before.messages)
    assert after.meta == {"prompt_": "q", "source": "x"}


def test_faults_leave_no_file(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("kept")
    with pytest.raises(DataError, match="row 2: 'prompt' is empty"):
        convert(write(tmp_path, {"prompt": "q"}, {"prompt": ""}), out, None, None, "auto")
    mixed = write(tmp_path, {"prompt": "q", "answer": 1}, {"prompt": "p", "answer": "one"})
    with pytest.raises(DataError, match="do not fit one Parquet schema.*--to jsonl"):
        convert(mixed, tmp_path / "out.parquet", None, None, "auto")
    with pytest.raises(ConfigError, match="as jsonl or parquet, not as 'csv'"):
        convert(mixed, tmp_path / "out.csv", None, None, "auto")
    assert out.read_text() == "kept" and sorted(path.name for path in tmp_path.iterdir()) == ["file.jsonl", "out.jsonl"]


@pytest.mark.parametrize(
    ("row", "kinds"),
    [
        ({"prompt": "q"}, ["prompts"]),
        ({"prompt": "q", "response": "a"}, ["demonstrations", "prompts"]),
        ({"prompt": "q", "response": "a", "score": None}, ["scores", "demonstrations", "prompts"]),
        ({"prompt": "q", "completion": "a", "label": True}, ["labels", "demonstrations", "prompts"]),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, ["preferences", "demonstrations", "prompts"]),
        ({"text": "x"}, ["documents"]),
    ],
)
def test_what_a_file_holds_is_detected_and_can_be_named(tmp_path: Path, row: dict[str, Any], kinds: list[str]) -> None:
    path = write(tmp_path, row)
    assert kinds_of(path, None) == kinds
    assert kinds_of(path, "documents") == ["documents"]


def test_an_unknown_kind_or_unknown_fields_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--as chats is not known; choose one of preferences, labels"):
        kinds_of(write(tmp_path, {"x": 1}), "chats")
    with pytest.raises(DataError, match=r"its fields \(x\) fit no known format"):
        kinds_of(write(tmp_path, {"x": 1}), None)
    path = tmp_path / "corpus.txt"
    path.write_text("Once upon a time")
    assert kinds_of(path, None) == ["documents"]


def test_a_mixture_becomes_one_file(tmp_path: Path) -> None:
    write(tmp_path, {"prompt": "q", "response": "a", "id": 1}).rename(tmp_path / "a.jsonl")
    (tmp_path / "mixture.yaml").write_text("sources: [{path: a.jsonl}, {path: b.jsonl}]")
    write(tmp_path, {"messages": TURNS, "id": 1}).rename(tmp_path / "b.jsonl")
    convert(tmp_path / "mixture.yaml", tmp_path / "out.jsonl", None, None, "auto")
    assert [record.id for record in records(tmp_path / "out.jsonl", "demonstrations")] == ["a:1", "b:1"]
