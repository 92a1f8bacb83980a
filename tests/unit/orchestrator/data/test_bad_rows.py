"""Bad rows: at least five kinds per format, each an error that names file, row and reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.data.kinds import KINDS
from orchestrator.data.streams import Stream
from orchestrator.errors import DataError
from tests.unit.orchestrator.data import annotation_rows
from tests.unit.orchestrator.data.test_demonstrations import TREE, TURNS, flat, node, write

MEDIA = [{"type": "image_url", "image_url": {"url": "x"}}]
HH = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
SHAREGPT = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
FEEDBACK = {
    "instruction": "q",
    "completions": [{"response": "a", "overall_score": 1}, {"response": "b", "overall_score": 0}],
}
RANKING = {"prompt": "q", "replies": ["a", "b"]}
HELPSTEER = {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": 1}

# A good row of every format.
GOOD: dict[str, dict[str, dict[str, Any]]] = {
    "prompts": {
        "messages": {"messages": TURNS},
        "oasst": TREE,
        "prompt": {"prompt": "q"},
        "hh-rlhf": HH,
        "alpaca": {"instruction": "q"},
        "alpaca-template": {"instruction": "q"},
        "question": {"question": "q"},
        "sharegpt": SHAREGPT,
        "mt-bench": {"question_id": 81, "turns": ["q", "more?"]},
    },
    "demonstrations": {
        "messages": {"messages": TURNS},
        "sharegpt": SHAREGPT,
        "oasst": TREE,
        "alpaca": {"instruction": "q", "output": "a"},
        "alpaca-template": {"instruction": "q", "output": "a"},
        "seeds": {"instruction": "q", "instances": [{"input": "", "output": "a"}]},
        "history": {"prompt": "q", "response": "a", "history": []},
        "prompt": {"prompt": "q", "response": "a"},
        "question": {"question": "q", "answer": "a"},
        "chosen": PAIR,
        **annotation_rows.GOOD["demonstrations"],
    },
    "preferences": {
        "ranking": RANKING,
        "pairwise": PAIR,
        "hh-rlhf": HH,
        "oasst": TREE,
        "ultrafeedback": FEEDBACK,
        "helpsteer": HELPSTEER,
        **annotation_rows.GOOD["preferences"],
    },
    "labels": {"kto": {"prompt": "q", "completion": "a", "label": True}},
    "scores": {
        "scored": {"user_input": "q", "completion": "a", "score": 0},
        "ultrafeedback": FEEDBACK,
        "helpsteer": {"prompt": "q", "response": "a", "helpfulness": 4},
        **annotation_rows.GOOD["scores"],
    },
    "documents": {"text": {"text": "x"}, "plain": {}},
}

OASST = [
    ({"message_tree_id": "t"}, "field 'prompt' is missing"),
    ({"message_tree_id": "t", "prompt": "q"}, "'prompt' must be the first message of a tree, found text"),
    ({"message_tree_id": "t", "prompt": node("t", "human", "q")}, "prompt: role must be prompter or assistant"),
    ({"message_tree_id": "t", "prompt": node("t", "prompter", "")}, "prompt: text must be text that is not empty"),
    (
        {"message_tree_id": "t", "prompt": {**node("t", "prompter", "q"), "replies": ["a"]}},
        "prompt.replies must be a list of messages, found a list",
    ),
    ({**flat(TREE)[1], "parent_id": "x"}, "parent_id is no earlier message of its tree; sort the rows by tree"),
]
INSTRUCTION = [
    ({"output": "a"}, "field 'instruction' is missing; the fields are: output"),
    ({"instruction": "", "output": "a"}, "'instruction' is empty"),
    ({"instruction": "q", "input": 3, "output": "a"}, "'input' must be text, found a number"),
    ({"instruction": ["q"], "output": "a"}, "'instruction' must be text, found a list"),
    ({"instruction": "q", "output": "a", "image": "x"}, "the row contains 'image', which a text model can't read"),
]
SHAREGPT_BAD = [
    ({"conversation": []}, "field 'conversations' is missing; the fields are: conversation"),
    ({"conversations": {"from": "human"}}, "'conversations' must be a list of {from, value}, found an object"),
    ({"conversations": [{"from": "alien", "value": "x"}]}, "conversations[0]: 'from' must be one of human, user"),
    ({"conversations": [{"from": "human", "value": 3}]}, "conversations[0]: content must be text, found a number"),
    ({"conversations": [{"from": "human", "value": ""}]}, "conversations[0]: the user's content is empty"),
    (
        {"conversations": [{"from": "function_call", "value": "add(1)"}]},
        "conversations[0].tool_calls is text but not JSON",
    ),
]


def bad_margins(row: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    return [
        ({**row, "margin": -0.5}, "'margin' must not be negative, because the better reply is named; found -0.5"),
        ({**row, "margin": "1"}, "the row: 'margin' must be a number or null, found text"),
        ({**row, "margin": True}, "the row: 'margin' must be a number or null, found true or false"),
        ({**row, "margin": float("nan")}, "the row: 'margin' must be finite, found nan"),
        ({**row, "margin": 10**400}, "the row: 'margin' must be finite, found inf"),
        ({**row, "margin": 1e300}, "the row: 'margin' must lie between -1e+09 and 1e+09, found 1e+300"),
    ]


BAD: dict[str, dict[str, list[tuple[dict[str, Any], str]]]] = {
    "demonstrations": {
        "messages": [
            ({"messages": [TURNS[1], {**TURNS[2], "weight": 0}]}, "turn 2 is marked as not to be learned"),
            ({"messages": [TURNS[1], {**TURNS[2], "train": False}]}, "turn 2 is marked as not to be learned"),
            ({"text": "x"}, "field 'messages' is missing; the fields are: text"),
            ({"messages": "q"}, "'messages' must be a list of {role, content}, found text"),
            ({"messages": []}, "'messages' must be a list of {role, content}, found a list"),
            ({"messages": [{"role": "bot", "content": "x"}]}, "messages[0]: role must be one of"),
            (
                {"messages": [{"role": "user", "content": MEDIA}]},
                "contains 'image_url', which a text model can't read",
            ),
            ({"messages": TURNS, "tools": "x"}, "tools is text but not JSON"),
            ({"messages": TURNS, "id": 1.5}, "'id' must be text or an integer"),
        ],
        "sharegpt": SHAREGPT_BAD,
        "oasst": OASST,
        "alpaca": [
            *INSTRUCTION,
            ({"instruction": "q"}, "field 'output' is missing"),
            ({"instruction": "q", "output": 3}, "'output' must be text"),
        ],
        "seeds": [
            ({"instruction": "q"}, "field 'instances' is missing"),
            ({"instruction": "q", "instances": []}, "'instances' must be a list of {input, output}, found a list"),
            ({"instruction": "q", "instances": ["a"]}, "'instances' must be a list of {input, output}, found a list"),
            ({"instruction": "q", "instances": [{"input": ""}]}, "field 'output' is missing"),
            ({"instances": [{"input": "", "output": "a"}]}, "field 'instruction' is missing"),
        ],
        "history": [
            ({"response": "a", "history": []}, "field 'prompt' is missing"),
            ({"prompt": "q", "history": []}, "field 'response' is missing"),
            ({"prompt": "q", "response": 1, "history": []}, "'response' must be text, found a number"),
            (
                {"prompt": "q", "response": "a", "history": "x"},
                "'history' must be a list of [question, answer], found text",
            ),
            ({"prompt": "q", "response": "a", "history": [["q0"]]}, "history[0] must be [question, answer], two texts"),
            ({"prompt": "q", "response": "a", "history": [["", "a0"]]}, "history[0]: the question is empty"),
        ],
        "prompt": [
            ({"completion": "a"}, "field 'prompt' is missing"),
            ({"prompt": "q"}, "field 'response' is missing"),
            ({"prompt": " ", "response": "a"}, "'prompt' is empty"),
            ({"prompt": "q", "response": None}, "'response' must be text or a list of texts, found null"),
            ({"prompt": "q", "response": {"role": "user", "content": "a"}}, "'response' must be the assistant's"),
        ],
        "question": [
            ({"answer": "a"}, "field 'question' is missing"),
            ({"question": "q"}, "field 'answer' is missing"),
            ({"question": ["q"], "answer": "a"}, "'question' must be text, found a list"),
            ({"question": "", "answer": "a"}, "'question' is empty"),
            ({"question": "q", "answer": 72}, "'answer' must be text, found a number"),
        ],
        "chosen": [
            ({"rejected": "b"}, "field 'chosen' is missing"),
            ({"chosen": "no turns", "rejected": "b"}, "'chosen' must be a transcript that starts with 'Human:'"),
            ({"chosen": 3, "rejected": "b"}, "'chosen' must be text, found a number"),
            ({"chosen": "", "rejected": "b"}, "'chosen' is empty"),
            ({"prompt": 3, "chosen": "a", "rejected": "b"}, "'prompt' must be text or a list of {role, content}"),
        ],
        "alpaca-template": INSTRUCTION,
        **annotation_rows.BAD["demonstrations"],
    },
    "prompts": {
        "messages": [
            ({"text": "x"}, "field 'messages' is missing; the fields are: text"),
            ({"messages": 3}, "'messages' must be text or a list of {role, content}, found a number"),
            ({"messages": [{"role": "bot", "content": "x"}]}, "messages[0]: role must be one of"),
            ({"messages": [{"role": "user", "content": MEDIA}]}, "messages[0].content[0] contains 'image_url'"),
            ({"messages": TURNS[2:]}, "no user message before the assistant's reply"),
        ],
        "oasst": OASST,
        "prompt": [
            ({"text": "x"}, "field 'prompt' is missing"),
            ({"prompt": ""}, "'prompt' is empty"),
            ({"prompt": 3}, "'prompt' must be text or a list of {role, content}, found a number"),
            ({"prompt": "q", "tools": {"name": "x"}}, "'tools' must be a list of tools, found an object"),
            ({"prompt": "q", "id": 1.5}, "'id' must be text or an integer"),
        ],
        "hh-rlhf": [
            ({"chosen": HH["chosen"]}, "field 'rejected' is missing"),
            ({"chosen": "no turns", "rejected": "b"}, "'chosen' must be a transcript that starts with 'Human:'"),
            ({"chosen": "", "rejected": ""}, "'chosen' is empty"),
            ({"chosen": 3, "rejected": 3}, "'chosen' must be text, found a number"),
            ({**HH, "audio": "x"}, "the row contains 'audio'"),
        ],
        "alpaca": INSTRUCTION,
        "alpaca-template": INSTRUCTION,
        "question": [
            ({"answer": "a"}, "field 'question' is missing"),
            ({"question": ["q"]}, "'question' must be text, found a list"),
            ({"question": " "}, "'question' is empty"),
            ({"question": "\ud800"}, "half of a surrogate pair"),
            ({"question": "q", "id": ""}, "'id' must be text or an integer"),
        ],
        "sharegpt": SHAREGPT_BAD,
        "mt-bench": [
            ({"question_id": 1}, "field 'turns' is missing"),
            ({"question_id": 1, "turns": "q"}, "'turns' must be a list of questions, found text"),
            ({"question_id": 1, "turns": []}, "'turns' must be a list of questions, found a list"),
            ({"question_id": 1, "turns": [""]}, "'turns' must be a list of questions, found a list"),
            ({"question_id": 1.5, "turns": ["x"]}, "'question_id' must be text or an integer"),
            ({"question_id": 81, "turns": ["x"]}, "id '81' is already used by row 1 for another prompt"),
        ],
    },
    "preferences": {
        "ranking": [
            ({"prompt": "q"}, "field 'replies' is missing"),
            ({"replies": ["a", "b"]}, "field 'prompt' is missing"),
            ({"prompt": "q", "replies": ["a"]}, "'replies' must hold at least two replies, best first; found 1"),
            ({"prompt": "q", "replies": 3}, "'replies' must be text or a list of texts, found a number"),
            ({"prompt": "q", "replies": ["a", {"role": "user", "content": "b"}]}, "'replies' must be the assistant's"),
            *bad_margins(RANKING),
            (
                {**RANKING, "scores": [1, 2]},
                "scores contradict the order: 1 of a reply that is ranked above",
            ),
            ({**RANKING, "scores": [1]}, "'scores' must be a list of 2 numbers, one per reply, found a list"),
            ({**RANKING, "scores": 1}, "'scores' must be a list of 2 numbers, one per reply, found a number"),
            ({**RANKING, "scores": [1, None]}, "scores: one of them is null; give a number for every reply, or none"),
            ({**RANKING, "scores": [1, "0"]}, "scores[1]: 'score' must be a number or null, found text"),
        ],
        "pairwise": [
            ({"prompt": "q", "chosen": "a"}, "field 'rejected' is missing"),
            ({"chosen": "a", "rejected": "b"}, "field 'prompt' is missing"),
            ({"prompt": "q", "chosen": 3, "rejected": "b"}, "'chosen' must be text or a list of texts"),
            ({"prompt": "", "chosen": "a", "rejected": "b"}, "'prompt' is empty"),
            ({"prompt": "else", "chosen": TURNS, "rejected": "b"}, "'chosen' is a conversation that neither contains"),
            *bad_margins(PAIR),
            (
                {**PAIR, "score_chosen": 6.5, "score_rejected": 7},
                "score_chosen and score_rejected contradict the order: 6.5 of a reply that is ranked above one with 7",
            ),
            ({**PAIR, "score_chosen": "7"}, "the row: 'score_chosen' must be a number or null, found text"),
        ],
        "hh-rlhf": [
            ({"chosen": HH["chosen"]}, "field 'rejected' is missing"),
            ({"chosen": "no turns", "rejected": "b"}, "'chosen' must be a transcript that starts with 'Human:'"),
            ({"chosen": "", "rejected": ""}, "'chosen' is empty"),
            ({"chosen": 3, "rejected": 3}, "'chosen' must be text, found a number"),
            ({**HH, "video": "x"}, "the row contains 'video'"),
            *bad_margins(HH),
        ],
        "oasst": [
            *OASST,
            (
                {
                    "message_tree_id": "t",
                    "prompt": node("t", "prompter", "q", node("1", "assistant", "a", rank="0")),
                },
                "a reply: 'rank' must be a number or null, found text",
            ),
        ],
        "ultrafeedback": [
            ({"completions": FEEDBACK["completions"]}, "field 'instruction' is missing"),
            ({"instruction": "q"}, "field 'completions' is missing"),
            ({"instruction": "q", "completions": ["a"]}, "'completions' must be a list of {response, overall_score}"),
            ({"instruction": "q", "completions": [{"overall_score": 1}]}, "field 'response' is missing"),
            (
                {"instruction": "q", "completions": [{"response": "a", "overall_score": "8"}]},
                "completions[0]: 'overall_score' must be a number or null, found text",
            ),
        ],
        "helpsteer": [
            ({**HELPSTEER, "preference_strength": None}, "'preference_strength' must be a number, found null"),
            ({**HELPSTEER, "preference_strength": "1"}, "'preference_strength' must be a number or null, found text"),
            ({"prompt": "q", "response_1": "a", "preference_strength": 1}, "field 'response2' is missing"),
            ({**HELPSTEER, "prompt": ""}, "'prompt' is empty"),
            ({**HELPSTEER, "response_1": 3}, "'response_1' must be text or a list of texts, found a number"),
        ],
        **annotation_rows.BAD["preferences"],
    },
    "labels": {
        "kto": [
            ({"prompt": "q", "completion": "a"}, "field 'label' is missing"),
            ({"prompt": "q", "completion": "a", "label": 1}, "'label' must be true or false, found a number"),
            ({"prompt": "q", "label": True}, "field 'completion' is missing"),
            ({"completion": "a", "label": True}, "field 'prompt' is missing"),
            ({"prompt": "q", "completion": None, "label": True}, "'completion' must be text or a list of texts"),
        ],
    },
    "scores": {
        "scored": [
            ({"user_input": "q", "completion": "a", "score": "4"}, "'score' must be a number or null, found text"),
            ({"user_input": "q", "completion": "a", "score": True}, "'score' must be a number or null, found true or"),
            ({"user_input": "q", "completion": "a", "score": float("nan")}, "'score' must be finite, found nan"),
            ({"user_input": "q", "completion": "a", "score": -2e9}, "'score' must lie between -1e+09 and 1e+09, found"),
            ({"user_input": "q", "score": 1}, "field 'completion' is missing"),
            ({"completion": "a", "score": 1}, "field 'prompt' is missing"),
        ],
        "ultrafeedback": [
            ({"completions": FEEDBACK["completions"]}, "field 'instruction' is missing"),
            ({"instruction": "q"}, "field 'completions' is missing"),
            ({"instruction": "q", "completions": {}}, "'completions' must be a list of {response, overall_score}"),
            ({"instruction": "q", "completions": [{"overall_score": 1}]}, "field 'response' is missing"),
            (
                {"instruction": "q", "completions": [{"response": "a", "overall_score": float("inf")}]},
                "completions[0]: 'overall_score' must be finite, found inf",
            ),
        ],
        "helpsteer": [
            ({"prompt": "q", "response": "a", "helpfulness": "4"}, "'helpfulness' must be a number or null"),
            ({"prompt": "q", "helpfulness": 4}, "field 'completion' is missing"),
            ({"response": "a", "helpfulness": 4}, "field 'prompt' is missing"),
            ({"prompt": "\n<extra_id_1>User\nq", "response": "a", "helpfulness": 4}, "'prompt' is empty before"),
            ({"prompt": ["q"], "response": "a", "helpfulness": 4}, "'prompt' must be text or a list of"),
        ],
        **annotation_rows.BAD["scores"],
    },
    "documents": {
        "text": [
            ({"content": "x"}, "field 'text' is missing; the fields are: content"),
            ({"text": 3}, "'text' must be text, found a number"),
            ({"text": None}, "'text' must be text, found null"),
            ({"text": "\ud800"}, "half of a surrogate pair"),
            ({"text": "y", "id": [1]}, "'id' must be text or an integer, found a list"),
        ],
    },
}
CASES = [
    (kind, name, row, fault) for kind, formats in BAD.items() for name, cases in formats.items() for row, fault in cases
]


@pytest.mark.parametrize(("kind", "name", "row", "fault"), CASES)
def test_a_bad_row_is_named_with_file_row_and_reason(
    tmp_path: Path, kind: str, name: str, row: dict[str, Any], fault: str
) -> None:
    path = write(tmp_path, GOOD[kind][name], row)
    stream = Stream(KINDS[kind], path, name)
    with pytest.raises(DataError) as caught:
        list(stream)
        stream.report()
    message = str(caught.value)
    assert str(path) in message and f".format={name!r}" in message
    assert "row 2: " in message and "row 1: " not in message and fault in message


@pytest.mark.parametrize(("kind", "name", "row"), [(k, n, row) for k, rows in GOOD.items() for n, row in rows.items()])
def test_good_rows_are_detected(tmp_path: Path, kind: str, name: str, row: dict[str, Any]) -> None:
    if name in ("alpaca-template", "plain"):
        return  # another format fits first
    stream = Stream(KINDS[kind], write(tmp_path, row))
    assert len(list(stream)) > 0 and stream.report().format == name


@pytest.mark.parametrize(("kind", "name", "row"), [(k, n, row) for k, rows in GOOD.items() for n, row in rows.items()])
def test_chinese_text_reaches_the_record_unchanged(tmp_path: Path, kind: str, name: str, row: dict[str, Any]) -> None:
    asked, answered = "天气怎么样？\u3000“好”", "答案：很好。😀"
    text = json.dumps(row).replace('"q"', json.dumps(asked)).replace('"a"', json.dumps(answered))
    text = text.replace(": q", f": {asked}").replace(": a", f": {answered}").replace('"x"', json.dumps(asked))
    path = tmp_path / "plain.txt" if name == "plain" else write(tmp_path, json.loads(text))
    if name == "plain":
        path.write_text(asked, encoding="utf-8")
    stream = Stream(KINDS[kind], path, name)
    shown = json.dumps([KINDS[kind].row(record) for record in stream], ensure_ascii=False)
    assert json.dumps(asked, ensure_ascii=False)[1:-1] in shown
    assert kind in ("prompts", "documents") or answered in shown


def test_five_kinds_of_bad_rows_of_every_format_are_tried() -> None:
    for kind, rows in GOOD.items():
        assert set(rows) == set(KINDS[kind].formats)
        assert set(BAD[kind]) == set(rows) - {"plain"}
    assert set(GOOD) == set(KINDS)
    assert all(len(cases) >= 5 for formats in BAD.values() for cases in formats.values())
