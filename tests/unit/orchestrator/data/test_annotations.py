"""Votes of arenas and records of annotation tools, in the forms of their documentation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.data.kinds import KINDS
from orchestrator.data.records import Message
from orchestrator.data.streams import Stream
from orchestrator.errors import DataError

ASK = [{"role": "user", "content": "Why?"}]


def read(path: Path, rows: list[Any], kind: str = "preferences", format: str = "auto") -> tuple[list[Any], Any]:
    path.write_text(json.dumps(rows))
    stream: Stream[Any] = Stream(KINDS[kind], path, format)
    return list(stream), stream.report()


def vote(winner: str, first: str = "one", second: str = "two") -> dict[str, Any]:
    def conversation(reply: str) -> list[dict[str, str]]:
        return [*ASK, {"role": "assistant", "content": reply}]

    return {
        "question_id": f"{winner} {first} {second}",
        "model_a": "alpha",
        "model_b": "beta",
        "winner": winner,
        "judge": "arena_user_1",
        "conversation_a": conversation(first),
        "conversation_b": conversation(second),
        "turn": 1,
        "anony": True,
        "language": "English",
        "tstamp": 1682351591.1,
    }


def test_arena_votes_are_pairs_and_ties_are_counted(tmp_path: Path) -> None:
    rows = [vote("model_a"), vote("model_b", "three"), vote("tie", "four"), vote("tie (bothbad)", "five")]
    records, report = read(tmp_path / "votes.json", rows)
    assert [list(record.replies) for record in records] == [["one", "two"], ["two", "three"]]
    assert report.format == "arena" and report.left_out == {"votes for a tie": 2}
    assert {record.id for record in records} == {records[0].id}  # one prompt is on one side of a split
    with pytest.raises(DataError, match=r"must be one of model_a, model_b, tie, tie \(bothbad\), found 'left'"):
        read(tmp_path / "votes.json", [vote("left")])


def argilla(responses: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {
        "id": "one",
        "fields": fields or {"prompt": "Why?", "response1": "a", "response2": "b", "response3": "c"},
        "metadata": {},
        "suggestions": {"preference": {"value": ["response1", "response2"], "score": None, "agent": "m"}},
        "responses": responses,
        "vectors": {},
        "_server_id": None,
    }


def test_argilla_rankings_name_fields(tmp_path: Path) -> None:
    answers = [
        {"value": ["response2", "response1", "response3"], "user_id": "u1", "status": "submitted"},
        {"value": ["response3", "response2", "response1"], "user_id": "u2"},
        {"value": ["response1", "response2", "response3"], "user_id": "u3", "status": "discarded"},
    ]
    records, report = read(tmp_path / "records.json", [argilla({"preference": answers, "topics": []})])
    assert [list(record.replies) for record in records] == [["b", "a", "c"], ["c", "b", "a"]]
    assert report.left_out == {"answers that were not submitted": 1}
    tied = [{"value": [{"value": f"response{n}", "rank": rank} for n, rank in ((1, 2), (2, 1), (3, 2))]}]
    records, _ = read(tmp_path / "records.json", [argilla({"preference": tied})])
    assert [list(record.replies) for record in records] == [["b", "a"], ["b", "c"]]


def test_argilla_columns_of_a_data_set(tmp_path: Path) -> None:
    row = {
        "id": "one",
        "chat": ASK,
        "a": "first",
        "b": "second",
        "ranking.responses": [["b", "a"], ["a", "b"]],
        "ranking.responses.users": ["u1", "u2"],
        "ranking.responses.status": ["submitted", "draft"],
    }
    records, report = read(tmp_path / "records.json", [row])
    assert [list(record.replies) for record in records] == [["second", "first"]] and report.format == "argilla"
    renamed = {name.replace("ranking", "order"): value for name, value in row.items()}
    records, _ = read(tmp_path / "records.json", [renamed], format="argilla")
    assert [list(record.replies) for record in records] == [["second", "first"]]


def test_argilla_ratings_and_texts(tmp_path: Path) -> None:
    rated = argilla({"rating": [{"value": 4}, {"value": 5}]}, instruction="Why?", response="so")
    (record,), _ = read(tmp_path / "records.json", [rated], "scores")
    assert (record.reply, record.score) == ("so", 4.5)
    written = argilla({"reply": [{"value": "mine"}, {"value": "yours"}]}, messages=ASK)
    records, _ = read(tmp_path / "records.json", [written], "demonstrations")
    assert [record.messages[-1] for record in records] == [Message("assistant", "mine"), Message("assistant", "yours")]


def test_argilla_records_that_can_not_be_read_say_why(tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    with pytest.raises(
        DataError, match=r"has no prompt: rename its field to one of messages, chat,.*the fields are: a, b"
    ):
        read(path, [argilla({"r": [{"value": ["a", "b"]}]}, a="x", b="y")])
    with pytest.raises(DataError, match=r"1 records without a ranking"):
        read(path, [argilla({"topics": [{"value": ["x", "y"]}]})])
    with pytest.raises(DataError, match=r"'responses\.r' must be a list of \{value, user_id\}, found true or false"):
        read(path, [argilla({"r": True})])
    with pytest.raises(DataError, match=r"'responses' must be an object, found a list"):
        read(path, [{**argilla({}), "responses": []}])


def task(data: dict[str, Any], *results: dict[str, Any], cancelled: bool = False) -> dict[str, Any]:
    annotation = {"id": 1, "result": list(results), "was_cancelled": cancelled, "ground_truth": False, "lead_time": 4.2}
    return {"id": 1, "data": data, "annotations": [annotation], "predictions": []}


def result(kind: str, value: Any, key: str | None = None, name: str = "x") -> dict[str, Any]:
    return {"id": "Dx", "from_name": name, "to_name": "y", "type": kind, "value": {key or kind: value}}


ITEMS = {
    "prompt": "What caused it?",
    "items": [
        {"id": "llm_1", "title": "LLM 1", "body": "one"},
        {"id": "llm_2", "title": "LLM 2", "body": "two"},
        {"id": "llm_3", "title": "LLM 3", "body": "three"},
    ],
}


@pytest.mark.parametrize(
    "value",
    [
        {"rank": ["llm_2", "llm_1", "llm_3"]},
        ["llm_2", "llm_1", "llm_3"],
        {"_": ["llm_3"], "best": ["llm_2", "llm_1"], "ads": []},
        {"rank": ["llm_2", "llm_1"], "not_rankable": ["llm_3"]},
    ],
)
def test_label_studio_rankings(tmp_path: Path, value: Any) -> None:
    (record,), report = read(tmp_path / "tasks.json", [task(ITEMS, result("ranker", value))])
    assert list(record.replies)[:2] == ["two", "one"] and len(record.replies) == str(value).count("llm_") - (
        isinstance(value, dict) and len(value) > 1
    )
    assert report.format == "label-studio"


def test_label_studio_comparisons(tmp_path: Path) -> None:
    data = {"prompt": "The quick brown fox...", "answer1": "jumps.", "answer2": "bags few lynx."}
    strong = result("rating", 3, name="strength")
    rows = [
        task(data, result("pairwise", "right", "selected"), strong),
        task({**data, "prompt": "Another"}, result("pairwise", "left", "selected")),
        task({**data, "prompt": "A third"}),  # Label Studio removes the result when nothing is selected
        task(data, result("pairwise", "left", "selected"), cancelled=True),
    ]
    records, report = read(tmp_path / "tasks.json", rows)
    assert [(list(record.replies), record.scores) for record in records] == [
        (["bags few lynx.", "jumps."], (3.0, 0.0)),
        (["jumps.", "bags few lynx."], ()),
    ]
    assert report.left_out == {
        "with equal replies": 1,
        "annotations that were cancelled": 1,
        "records without a ranking": 1,
    }


def test_label_studio_ratings_and_texts(tmp_path: Path) -> None:
    rated = task({"prompt": "Why?", "response": "so"}, result("rating", 4), result("choices", ["spam"]))
    (record,), _ = read(tmp_path / "tasks.json", [rated], "scores")
    assert (record.reply, record.score) == ("so", 4.0)
    written = task({"prompt": "Why?"}, result("textarea", ["mine"], "text"))
    (text,), _ = read(tmp_path / "tasks.json", [written], "demonstrations")
    assert text.messages[-1] == Message("assistant", "mine")


def test_label_studio_tasks_that_can_not_be_read_say_why(tmp_path: Path) -> None:
    path = tmp_path / "tasks.json"
    with pytest.raises(DataError, match=r"several buckets \(good, bad\); call the one that is in order 'rank'"):
        read(path, [task(ITEMS, result("ranker", {"good": ["llm_1"], "bad": ["llm_2"]}))])
    with pytest.raises(DataError, match="names 'llm_9', which is no id of its items"):
        read(path, [task(ITEMS, result("ranker", ["llm_9", "llm_1"]))])
    with pytest.raises(DataError, match=r"no list of \{id, body\} to rank; the fields of its data are: prompt"):
        read(path, [task({"prompt": "x"}, result("ranker", ["a", "b"]))])
    with pytest.raises(DataError, match="selects left or right, found 'middle'"):
        read(path, [task({"prompt": "x", "text1": "a", "text2": "b"}, result("pairwise", "middle", "selected"))])
