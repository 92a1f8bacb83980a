"""Whole conversations, begun replies, tool calls: no part of a row is lost, duplicated or changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.data.kinds import PROMPTS, RANKINGS
from orchestrator.data.readers import read_all
from orchestrator.data.records import Message, ToolCall, content_id, message_dicts, messages_from_dicts
from orchestrator.errors import DataError

Turn = dict[str, Any]
USER: Turn = {"role": "user", "content": "Weather in Oslo?"}
CALL: Turn = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}],
}
RESULT: Turn = {"role": "tool", "name": "get_weather", "content": "4 degrees"}
TOOL = {"type": "function", "function": {"name": "get_weather"}}


def user(content: str) -> Turn:
    return {"role": "user", "content": content}


def assistant(content: str) -> Turn:
    return {"role": "assistant", "content": content}


SYSTEM: Turn = {"role": "system", "content": "Be brief."}
ASKED = [user("q")]
POEM = [user("Write a poem"), assistant("Roses are")]
SUM = [user("What is 2+2?"), assistant("4"), user("And 3+3?")]


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def turns(messages: tuple[Message, ...]) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in messages]


def plain(*messages: Turn) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


@pytest.mark.parametrize(
    ("row", "expected", "replies"),
    [
        # White space at the edges does not distinguish turns.
        (
            {
                "prompt": "What is 2+2?",
                "chosen": [user("What is 2+2?\n"), assistant("4")],
                "rejected": [user("What is 2+2?\n"), assistant("5")],
            },
            [user("What is 2+2?\n")],
            ("4", "5"),
        ),
        (
            {"prompt": "q", "chosen": [user(" q"), assistant("a")], "rejected": [user("q\r\n"), assistant("b")]},
            [user(" q")],
            ("a", "b"),
        ),
        (  # ... nor the two conversations
            {"chosen": [*SUM, assistant("6")], "rejected": [user("What is 2+2? "), *SUM[1:], assistant("7")]},
            SUM,
            ("6", "7"),
        ),
        # The prompt is the last turn or the beginning of the whole conversation.
        ({"prompt": "And 3+3?", "chosen": [*SUM, assistant("6")], "rejected": [*SUM, assistant("7")]}, SUM, ("6", "7")),
        ({"prompt": SUM, "chosen": [*SUM, assistant("6")], "rejected": [*SUM, assistant("7")]}, SUM, ("6", "7")),
        (
            {"prompt": SUM[1:], "chosen": [*SUM, assistant("6")], "rejected": [*SUM, assistant("7")]},
            SUM,
            ("6", "7"),
        ),
        (  # the prompt is only the first turn; the conversations continue it
            {"prompt": "What is 2+2?", "chosen": [*SUM, assistant("6")], "rejected": [*SUM, assistant("7")]},
            SUM,
            ("6", "7"),
        ),
        (
            {"prompt": SUM[:2], "chosen": [SUM[2], assistant("6")], "rejected": [SUM[2], assistant("7")]},
            SUM,
            ("6", "7"),
        ),
        # Either may contain system messages.
        (
            {"prompt": "q", "chosen": [SYSTEM, *ASKED, assistant("a")], "rejected": [SYSTEM, *ASKED, assistant("b")]},
            [SYSTEM, user("q")],
            ("a", "b"),
        ),
        (
            {"prompt": [SYSTEM, *ASKED], "chosen": [*ASKED, assistant("a")], "rejected": [*ASKED, assistant("b")]},
            [SYSTEM, user("q")],
            ("a", "b"),
        ),
        (
            {"prompt": [SYSTEM], "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
            [SYSTEM, user("q")],
            ("a", "b"),
        ),
        # A begun reply belongs to the prompt; it is removed from replies that repeat it.
        ({"prompt": POEM, "chosen": " red", "rejected": " dead"}, POEM, (" red", " dead")),
        ({"prompt": POEM, "chosen": [assistant(" red")], "rejected": [assistant(" dead")]}, POEM, (" red", " dead")),
        ({"prompt": POEM, "chosen": "Roses are red", "rejected": "Roses are dead"}, POEM, (" red", " dead")),
        ({"prompt": POEM, "replies": [" red", " dead", " blue"]}, POEM, (" red", " dead", " blue")),
        ({"messages": POEM, "replies": [" red", " dead"]}, POEM, (" red", " dead")),
        ({"prompt": [user("q"), assistant("")], "chosen": "a", "rejected": "b"}, [user("q")], ("a", "b")),
        # Published transcripts with a prompt.
        (
            {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " a", "rejected": " b"},
            [user("q")],
            (" a", " b"),
        ),
        (
            {"prompt": "q", "chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
            [user("q")],
            ("a", "b"),
        ),
    ],
)
def test_the_conversation_of_a_pair_comes_once_and_whole(
    tmp_path: Path, row: dict[str, Any], expected: list[Turn], replies: tuple[str, ...]
) -> None:
    (record,), _ = read_all(RANKINGS, write(tmp_path, row))
    assert turns(record.messages) == plain(*expected)
    assert record.replies == replies


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"prompt": POEM, "chosen": "Roses are red", "rejected": "No"}, "only some replies repeat that beginning"),
        ({"prompt": [*POEM, assistant("x")], "chosen": "a", "rejected": "b"}, "two consecutive turns of the assistant"),
        ({"chosen": [*POEM, assistant("a")], "rejected": [*POEM, assistant("b")]}, "two consecutive turns of the"),
        (
            {"prompt": "q", "chosen": [user("other"), assistant("a")], "rejected": [user("other"), assistant("b")]},
            "neither contains nor continues the prompt",
        ),
        (
            {
                "prompt": [{"role": "system", "content": "x"}, user("q")],
                "chosen": [SYSTEM, user("q"), assistant("a")],
                "rejected": [SYSTEM, user("q"), assistant("b")],
            },
            "different system message",
        ),
        ({"prompt": [USER, CALL], "chosen": "a", "rejected": "b"}, "ends with a tool call"),
        ({"prompt": "q", "chosen": [user("x")], "rejected": "b"}, "neither contains nor continues"),
        ({"prompt": "q", "replies": [RESULT, "b"]}, "must be the assistant's"),
    ],
)
def test_pairs_that_can_be_read_in_two_ways_are_bad_rows(tmp_path: Path, row: dict[str, Any], fault: str) -> None:
    with pytest.raises(DataError, match="row 1") as caught:
        read_all(RANKINGS, write(tmp_path, row))
    assert fault in str(caught.value)


def test_a_begun_turn_stays_at_the_end_of_a_prompt(tmp_path: Path) -> None:
    (record,), _ = read_all(PROMPTS, write(tmp_path, {"prompt": POEM}))
    assert (turns(record.messages), record.text) == (plain(*POEM), "Write a poem")
    with pytest.raises(DataError, match="two consecutive turns of the assistant"):
        read_all(PROMPTS, write(tmp_path, {"prompt": [*POEM, assistant("x")]}))


def test_prompts_of_a_preference_file_are_those_that_its_replies_answer(tmp_path: Path) -> None:
    rows = (
        {"prompt": "And 3+3?", "chosen": [*SUM, assistant("6")], "rejected": [*SUM, assistant("7")]},
        {"prompt": "q", "chosen": [assistant("6")], "rejected": [assistant("7")]},
        {"prompt": "\n\nHuman: hi\n\nAssistant: ho\n\nHuman: hm\n\nAssistant:", "chosen": "a", "rejected": "b"},
    )
    prompts, _ = read_all(PROMPTS, write(tmp_path, *rows))
    pairs, _ = read_all(RANKINGS, write(tmp_path, *rows))
    assert [turns(prompt.messages) for prompt in prompts] == [turns(pair.messages) for pair in pairs]
    assert [prompt.id for prompt in prompts] == [pair.id for pair in pairs]
    assert turns(prompts[0].messages) == plain(*SUM)
    assert turns(prompts[2].messages) == plain(user("hi"), assistant("ho"), user("hm"))


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {**CALL, "content": None},
        {"role": "assistant", "tool_calls": [{"name": "get_weather", "arguments": {"city": "Oslo"}}]},
        {"role": "assistant", "function_call": {"name": "get_weather", "arguments": '{"city":"Oslo"}'}},
        {"role": "assistant", "content": "", "tool_calls": json.dumps(CALL["tool_calls"])},
        {
            "role": "assistant",
            "content": [],
            "tool_calls": [{"function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}],
        },
    ],
)
@pytest.mark.parametrize("tools", [[TOOL], [TOOL["function"]], json.dumps([TOOL])])
def test_calls_results_and_tools_reach_the_record_in_one_form(tmp_path: Path, call: Turn, tools: Any) -> None:
    key = "functions" if tools == [TOOL["function"]] else "tools"
    (record,), _ = read_all(PROMPTS, write(tmp_path, {"messages": [USER, call, RESULT], key: tools, "answer": 4}))
    assert record.messages[1] == Message("assistant", "", (ToolCall("get_weather", '{"city": "Oslo"}'),))
    assert record.messages[2] == Message("tool", "4 degrees", name="get_weather")
    assert (record.tools, dict(record.meta)) == ((TOOL,), {"answer": 4})
    assert message_dicts(record.messages) == [USER, CALL, RESULT]
    assert messages_from_dicts(message_dicts(record.messages)) == record.messages
    assert record.id == content_id(record.messages, (TOOL,)) != content_id(record.messages)


def test_results_of_tools_and_ids_of_calls_are_kept(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "function": {"name": "f"}}]}
    result = {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "4"}]}
    old = {"role": "function", "name": "f", "content": "4"}
    (record,), _ = read_all(PROMPTS, write(tmp_path, {"prompt": [USER, call, result, old]}))
    assert record.messages[1].tool_calls == (ToolCall("f", "{}", "c1"),)
    assert record.messages[2:] == (Message("tool", "4", tool_call_id="c1"), Message("tool", "4", name="f"))
    assert messages_from_dicts(message_dicts(record.messages)) == record.messages


def test_replies_that_differ_only_in_their_call_are_two(tmp_path: Path) -> None:
    def calling(name: str, **arguments: Any) -> Turn:
        return {**assistant(""), "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}

    rows = (
        {"prompt": [USER], "chosen": [calling("a")], "rejected": [calling("b")]},
        {"prompt": [USER], "chosen": [calling("a", x=1)], "rejected": [calling("a", x=2)], "tools": [TOOL]},
        {"prompt": [USER], "chosen": [calling("a")], "rejected": [assistant("I can't know.")]},
    )
    records, report = read_all(RANKINGS, write(tmp_path, *rows))
    (ranked,), _ = read_all(RANKINGS, write(tmp_path, {"prompt": "q", "replies": [calling("a"), calling("b"), "no"]}))
    assert (len(records), report.left_out) == (3, {})
    names = [[r if isinstance(r, str) else r.tool_calls[0].name for r in record.replies] for record in records]
    assert names == [["a", "b"], ["a", "a"], ["a", "I can't know."]]
    assert records[1].tools == (TOOL,)
    assert [r if isinstance(r, str) else r.tool_calls[0].name for r in ranked.replies] == ["a", "b", "no"]
    with pytest.raises(DataError, match="1 with equal replies"):
        read_all(
            RANKINGS, write(tmp_path, {"prompt": "q", "chosen": [calling("a", x=1)], "rejected": [calling("a", x=1)]})
        )


def test_other_fields_of_messages_are_kept_for_the_template(tmp_path: Path) -> None:
    thought = {"role": "assistant", "content": "4", "reasoning_content": "2 and 2", "weight": 0, "refusal": None}
    rows = ({"messages": [user("2+2?"), thought, user("sure?")]}, {"messages": SUM})
    (record, other), _ = read_all(PROMPTS, write(tmp_path, *rows))
    assert message_dicts(record.messages)[1] == {
        **assistant("4"),
        "reasoning_content": "2 and 2",
        "weight": 0,
    }
    assert all(message.extra is None for message in other.messages)
    pair = {"prompt": "q", "chosen": [thought], "rejected": [{**thought, "reasoning_content": "hm"}]}
    (ranking,), _ = read_all(RANKINGS, write(tmp_path, pair))
    thoughts = [reply.extra for reply in ranking.replies if isinstance(reply, Message)]
    assert [json.loads(thought or "")["reasoning_content"] for thought in thoughts] == ["2 and 2", "hm"]


def test_text_parts_are_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Read this."}, {"type": "text", "text": "And that."}]
    (record,), _ = read_all(PROMPTS, write(tmp_path, {"messages": [{"role": "user", "content": parts}]}))
    assert turns(record.messages) == [("user", "Read this.\nAnd that.")]


IMAGE = {"type": "image_url", "image_url": {"url": "http://x/y.png"}}


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"prompt": "q", "images": ["x.png"]}, "the row contains 'images'"),
        ({"messages": [USER], "image": {"bytes": "x"}}, "the row contains 'image'"),
        ({"messages": [{**USER, "images": ["x"]}]}, "messages[0] contains 'images'"),
        ({"messages": [{**USER, "content": [{"type": "text", "text": "x"}, IMAGE]}]}, "content[1] contains 'image_url"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "part of type 'image'"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}, "'input_audio'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "part of type 'text'"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "content must be text, found null"),
        ({"messages": [{**USER, "tool_calls": CALL["tool_calls"]}]}, "only the assistant can call tools"),
        ({"messages": [USER, {**CALL, "tool_calls": [{"function": {}}]}, RESULT]}, "without a name"),
        ({"messages": [USER, {**CALL, "tool_calls": [{"name": "f", "arguments": "{x"}]}, RESULT]}, "text but not JSON"),
        ({"messages": [USER, {**CALL, "tool_calls": [{"name": "f", "arguments": [1]}]}, RESULT]}, "found a list"),
        ({"messages": [USER, {**CALL, "tool_calls": {"a": 1}}, RESULT]}, "tool_calls must be a list"),
        ({"messages": [USER, {**CALL, "function_call": {"name": "f"}}, RESULT]}, "both tool_calls and function_call"),
        ({"messages": [USER], "tools": {"a": 1}}, "'tools' must be a list of tools"),
        ({"messages": [USER], "tools": "no json"}, "text but not JSON"),
        ({"messages": [USER], "tools": [{"type": "function"}]}, "tools[0] must be"),
        ({"messages": [USER, {**RESULT, "name": 3}]}, "'name' must be text"),
        ({"messages": [USER, {**CALL, "tool_calls": [{"name": "\ud800"}]}, RESULT]}, "half of a surrogate pair"),
        ({"messages": [USER, {**RESULT, "name": "\ud800"}]}, "half of a surrogate pair"),
        ({"messages": [USER], "tools": [{"name": "f", "description": "\ud800"}]}, "half of a surrogate pair"),
    ],
)
def test_what_a_text_model_can_not_be_shown_is_a_bad_row(tmp_path: Path, row: dict[str, Any], fault: str) -> None:
    with pytest.raises(DataError, match="row 1: ") as caught:
        read_all(PROMPTS, write(tmp_path, row))
    assert fault in str(caught.value)


@pytest.mark.parametrize("empty", [[], None, ""])
def test_empty_images_and_tools_are_none(tmp_path: Path, empty: Any) -> None:
    (record,), _ = read_all(PROMPTS, write(tmp_path, {"prompt": "q", "images": empty, "tools": empty}))
    assert record.tools == () and turns(record.messages) == plain(user("q"))


def test_columns_of_parquet_structs_equal_the_same_rows_as_lines(tmp_path: Path) -> None:
    rows = [
        {"messages": [USER, CALL, RESULT], "tools": [TOOL], "answer": {"n": 4}},
        {"messages": [user("q")], "tools": [], "answer": {"text": "x"}},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    as_parquet, _ = read_all(PROMPTS, tmp_path / "rows.parquet")
    as_lines, _ = read_all(PROMPTS, write(tmp_path, *rows))
    assert as_parquet == as_lines
    assert as_parquet[1].meta == {"answer": {"text": "x"}}
