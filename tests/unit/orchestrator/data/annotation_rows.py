"""Good and bad rows of votes and annotation tools, by kind and format."""

from __future__ import annotations

from typing import Any

ASK = [{"role": "user", "content": "q"}]
VOTE: dict[str, Any] = {
    "conversation_a": [*ASK, {"role": "assistant", "content": "a"}],
    "conversation_b": [*ASK, {"role": "assistant", "content": "b"}],
    "winner": "model_a",
}


def record(**answers: Any) -> dict[str, Any]:
    responses = {question: [{"value": value, "user_id": "u"}] for question, value in answers.items()}
    return {"fields": {"prompt": "q", "response": "a", "other": "b"}, "responses": responses}


def task(*results: dict[str, Any], **data: Any) -> dict[str, Any]:
    shown = {"prompt": "q", "response": "a", **data}
    return {"data": shown, "annotations": [{"result": list(results)}]}


def result(kind: str, value: Any, key: str | None = None) -> dict[str, Any]:
    return {"type": kind, "value": {key or kind: value}}


RANKER = result("ranker", {"rank": ["1", "2"]})
ITEMS = [{"id": "1", "body": "a"}, {"id": "2", "body": "b"}]
RANKED = record(ranking=["response", "other"])
RATED = record(rating=4)
WRITTEN = record(reply="a")

GOOD: dict[str, dict[str, dict[str, Any]]] = {
    "preferences": {"arena": VOTE, "argilla": RANKED, "label-studio": task(RANKER, items=ITEMS)},
    "scores": {"argilla": RATED, "label-studio": task(result("rating", 4))},
    "demonstrations": {"argilla": WRITTEN, "label-studio": task(result("textarea", ["a"], "text"))},
}


def bad_records(good: dict[str, Any], question: str) -> list[tuple[dict[str, Any], str]]:
    return [
        ({"fields": good["fields"]}, "field 'responses' is missing; the fields are: fields"),
        ({**good, "fields": "q"}, "'fields' must be an object, found text"),
        ({**good, "responses": ["a"]}, "'responses' must be an object, found a list"),
        (
            {**good, "responses": {question: "a"}},
            f"'responses.{question}' must be a list of {{value, user_id}}, found text",
        ),
        ({**good, "fields": {"response": "a", "other": "b"}}, "has no prompt: rename its field to one of messages, "),
        ({**good, "image": "x"}, "the row contains 'image'"),
    ]


def bad_tasks(good: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    data = {name: value for name, value in good["data"].items() if name != "prompt"}
    return [
        ({"annotations": good["annotations"]}, "field 'data' is missing; the fields are: annotations"),
        ({"data": good["data"]}, "field 'annotations' is missing; the fields are: data"),
        ({**good, "data": "q"}, "'data' must be an object, found text"),
        ({**good, "annotations": "a"}, "'annotations' must be a list of {result}, found text"),
        ({**good, "annotations": [{"result": "a"}]}, "'result' must be a list of {type, value}, found text"),
        ({**good, "data": data}, "has no prompt: rename its field to one of messages, "),
    ]


BAD: dict[str, dict[str, list[tuple[dict[str, Any], str]]]] = {
    "preferences": {
        "arena": [
            ({**VOTE, "winner": "a"}, "'winner' must be one of model_a, model_b, tie, tie (bothbad), found 'a'"),
            ({**VOTE, "winner": ["tie"]}, "found ['tie']"),
            ({name: VOTE[name] for name in ("conversation_a", "winner")}, "field 'conversation_b' is missing"),
            ({**VOTE, "conversation_a": 3}, "'conversation_a' must be text or a list of {role, content}"),
            ({**VOTE, "conversation_a": [{"role": "bot", "content": "x"}]}, "conversation_a[0]: role must be one of"),
        ],
        "argilla": bad_records(RANKED, "ranking"),
        "label-studio": [
            *bad_tasks(task(RANKER, items=ITEMS)),
            (task(RANKER), "no list of {id, body} to rank; the fields of its data are: prompt, response"),
            (
                task(result("ranker", "1"), items=ITEMS),
                "a ranking must be a list of ids, or one per bucket, found text",
            ),
            (task(result("ranker", {"rank": "1"}), items=ITEMS), "bucket 'rank' must be a list of ids, found text"),
        ],
    },
    "scores": {
        "argilla": [
            *bad_records(RATED, "rating"),
            (record(rating="4"), "'rating' must be a number or null, found text"),
        ],
        "label-studio": [
            *bad_tasks(task(result("rating", 4))),
            (task(result("rating", "4")), "a result: 'rating' must be a number or null, found text"),
        ],
    },
    "demonstrations": {
        "argilla": [*bad_records(WRITTEN, "reply"), (record(reply=4), "'reply' must be text or a list of texts")],
        "label-studio": [
            *bad_tasks(task(result("textarea", ["a"], "text"))),
            (task(result("textarea", [4], "text")), "'text' must be text or a list of texts, found a number"),
        ],
    },
}
