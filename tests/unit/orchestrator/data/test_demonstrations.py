"""Demonstrations: every format yields whole conversations, and errors name each bad row and its fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.data.formats.demonstrations import DEMONSTRATION_FORMATS
from orchestrator.data.kinds import DEMONSTRATIONS, PROMPTS
from orchestrator.data.readers import read_all
from orchestrator.data.records import Message, ToolCall, content_id
from tests.unit.orchestrator.data import annotation_rows

SYSTEM, ASKED, REPLY = Message("system", "s"), Message("user", "q"), Message("assistant", "a")
TURNS = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
HH = "\n\nHuman: q\n\nAssistant: {}"


def node(name: str, role: str, text: str, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"message_id": name, "role": role, "text": text, "replies": list(replies), **more}


TREE = {
    "message_tree_id": "t",
    "prompt": node(
        "t",
        "prompter",
        "q",
        node("1", "assistant", "a", node("2", "prompter", "more?", node("3", "assistant", "b")), rank=1),
        node("4", "assistant", "c", node("5", "prompter", "why?"), rank=0),
        node("6", "assistant", "d", deleted=True),
    ),
}


def flat(tree: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a flat table, like OASST's published Parquet files."""
    rows: list[dict[str, Any]] = []

    def visit(found: dict[str, Any], parent: str | None) -> None:
        others = {key: value for key, value in found.items() if key != "replies"}
        rows.append({**others, "parent_id": parent, "message_tree_id": tree["message_tree_id"]})
        for reply in found["replies"]:
            visit(reply, found["message_id"])

    visit(tree["prompt"], None)
    return rows


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "file.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


GOOD: list[tuple[str, dict[str, Any], list[Message]]] = [
    ("messages", {"messages": TURNS}, [SYSTEM, ASKED, REPLY]),
    ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [ASKED, REPLY]),
    ("sharegpt", {"system": "s", "conversations": TURNS[1:]}, [SYSTEM, ASKED, REPLY]),
    ("alpaca", {"instruction": "q", "input": "", "output": "a"}, [ASKED, REPLY]),
    ("alpaca", {"instruction": "q", "input": "i", "output": "a"}, [Message("user", "q\n\ni"), REPLY]),
    ("alpaca", {"instruction": "q", "context": "i", "response": "a"}, [Message("user", "q\n\ni"), REPLY]),
    ("seeds", {"instruction": "q", "instances": [{"input": "", "output": "a"}]}, [ASKED, REPLY]),
    (
        "history",
        {"prompt": "q", "response": "a", "history": [["q0", "a0"]]},
        [Message("user", "q0"), Message("assistant", "a0"), ASKED, REPLY],
    ),
    ("prompt", {"prompt": "q", "completion": "a"}, [ASKED, REPLY]),
    ("prompt", {"prompt": TURNS[:2], "completion": TURNS[2:]}, [SYSTEM, ASKED, REPLY]),
    ("prompt", {"prompt": TURNS[:2], "response": "a"}, [SYSTEM, ASKED, REPLY]),
    (
        "prompt",
        {"prompt": [TURNS[1], {"role": "assistant", "content": "Well, "}], "response": "a"},
        [ASKED, Message("assistant", "Well, a")],
    ),
    ("question", {"question": "q", "answer": "a"}, [ASKED, REPLY]),
    ("question", {"system_prompt": "s", "question": "q", "response": "a"}, [SYSTEM, ASKED, REPLY]),
    ("chosen", {"chosen": HH.format("a"), "rejected": HH.format("b")}, [ASKED, REPLY]),
    ("chosen", {"prompt": "q", "chosen": "a", "rejected": "b"}, [ASKED, REPLY]),
    *((name, row, [ASKED, REPLY]) for name, row in annotation_rows.GOOD["demonstrations"].items()),
]


@pytest.mark.parametrize(("name", "row", "expected"), GOOD)
def test_each_format_is_detected_and_gives_whole_conversations(
    tmp_path: Path, name: str, row: dict[str, Any], expected: list[Message]
) -> None:
    for format in ("auto", name):
        (record,), report = read_all(DEMONSTRATIONS, write(tmp_path, row), format)
        assert (report.format, record.messages) == (name, tuple(expected))
        assert record.id == content_id(expected) and not report.left_out


def test_a_row_of_every_format_is_tried() -> None:
    assert {name for name, _, _ in GOOD} | {"oasst", "alpaca-template"} == set(DEMONSTRATION_FORMATS)


def test_the_templates_of_stanford_alpaca_are_word_for_word_and_the_same_for_prompts(tmp_path: Path) -> None:
    rows = [{"instruction": "Add {x}.", "input": "1 2", "output": "3"}, {"instruction": "Sing.", "output": "La"}]
    path = write(tmp_path, *rows)
    with_input = (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd {x}.\n\n### Input:\n1 2\n\n"
        "### Response:"
    )
    without = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSing.\n\n### Response:"
    )
    records, _ = read_all(DEMONSTRATIONS, path, "alpaca-template")
    assert [record.messages for record in records] == [
        (Message("user", with_input), Message("assistant", "3")),
        (Message("user", without), Message("assistant", "La")),
    ]
    for format in ("alpaca", "alpaca-template"):
        prompts, conversations = read_all(PROMPTS, path, format)[0], read_all(DEMONSTRATIONS, path, format)[0]
        assert [prompt.messages for prompt in prompts] == [record.messages[:-1] for record in conversations]


def test_tools_calls_and_results_stay_turns(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    call = {"name": "add", "arguments": {"x": 1}}
    row = {
        "conversations": [
            {"from": "human", "value": "1+1?"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "two"},
        ],
        "tools": json.dumps(tools),
    }
    (record,), _ = read_all(DEMONSTRATIONS, write(tmp_path, row))
    assert record.tools == tuple(tools)
    assert record.messages == (
        Message("user", "1+1?"),
        Message("assistant", "", (ToolCall("add", '{"x": 1}'),)),
        Message("tool", "2"),
        Message("assistant", "two"),
    )


def test_a_prompt_of_a_tree_knows_its_language(tmp_path: Path) -> None:
    tree = {**TREE, "prompt": {**TREE["prompt"], "lang": "zh"}}
    for rows in ([tree], flat(tree)):
        records, _ = read_all(PROMPTS, write(tmp_path, *rows))
        assert {record.meta["lang"] for record in records} == {"zh"}
    records, _ = read_all(PROMPTS, write(tmp_path, TREE))
    assert not any("lang" in record.meta for record in records)


def test_a_tree_gives_the_path_to_every_leaf_and_counts_the_rest(tmp_path: Path) -> None:
    expected = [["q", "a", "more?", "b"], ["q", "c"]]
    left_out = {"turns after the last reply": 1, "messages that were deleted": 1}
    for rows in ([TREE], flat(TREE)):
        records, report = read_all(DEMONSTRATIONS, write(tmp_path, *rows))
        assert [[turn.content for turn in record.messages] for record in records] == expected
        assert {record.id for record in records} == {"t"}
        assert (report.format, report.num_rows, report.left_out) == ("oasst", len(rows), left_out)


def test_trees_of_a_flat_table_are_kept_apart(tmp_path: Path) -> None:
    other = {"message_tree_id": "u", "prompt": node("u", "prompter", "x", node("v", "assistant", "y"))}
    records, _ = read_all(DEMONSTRATIONS, write(tmp_path, *flat(TREE), *flat(other)))
    assert [record.id for record in records] == ["t", "t", "u"]


def test_prompts_of_a_tree_end_with_the_prompter(tmp_path: Path) -> None:
    for rows in ([TREE], flat(TREE)):
        records, report = read_all(PROMPTS, write(tmp_path, *rows))
        found = [[turn.content for turn in record.messages] for record in records]
        assert found == [["q"], ["q", "a", "more?"], ["q", "c", "why?"]]
        assert len({record.id for record in records}) == 3 and report.format == "oasst"


def test_what_teaches_nothing_is_left_out_and_counted(tmp_path: Path) -> None:
    answered = {"messages": TURNS}
    rows = [
        answered,
        answered,
        {"messages": TURNS[:2]},
        {"messages": [*TURNS[:2], {"role": "assistant", "content": " "}]},
        {"messages": [TURNS[1], TURNS[2], TURNS[1]]},
    ]
    records, report = read_all(DEMONSTRATIONS, write(tmp_path, *rows))
    assert [record.messages for record in records] == [(SYSTEM, ASKED, REPLY), (ASKED, REPLY)]
    assert report.left_out == {
        "already read": 1,
        "conversations without a reply of the assistant": 1,
        "conversations with an empty reply": 1,
        "turns after the last reply": 1,
    }


def test_a_conversation_may_begin_with_the_assistant(tmp_path: Path) -> None:
    turns = [{"from": "gpt", "value": "a"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    (record,), _ = read_all(DEMONSTRATIONS, write(tmp_path, {"conversations": turns}))
    assert record.messages == (REPLY, ASKED, REPLY)
