"""The small inputs of ../shared/cases, each of which once gave a wrong value; other tests here have copies."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.data.kinds import PROMPTS, RANKINGS
from orchestrator.data.readers import read_all
from orchestrator.data.records import Message, ToolCall

FOLDER = Path(__file__).parents[5] / "shared" / "cases"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"{FOLDER} is absent: it holds inputs that were misread")
SUM = [("user", "What is 2+2?"), ("assistant", "4"), ("user", "And 3+3?")]
POEM = [("user", "Write a poem"), ("assistant", "Roses are")]


def turns(messages: tuple[Message, ...]) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in messages]


@pytest.mark.parametrize("name", ["two_arrays.json", "array_then_lines.json"])
def test_joined_arrays_give_four_records(name: str) -> None:
    assert [record.text for record in read_all(PROMPTS, FOLDER / name)[0]] == ["a0", "a1", "b0", "b1"]


@pytest.mark.parametrize(
    ("name", "expected", "replies"),
    [
        ("pairwise_white_space.jsonl", [("user", "What is 2+2?\n")], ("4", "5")),
        ("pairwise_last_turn_as_prompt.jsonl", SUM, ("6", "7")),
        ("pairs_end_with_assistant.jsonl", POEM, (" red", " dead")),
    ],
)
def test_pairs_come_once_and_whole(name: str, expected: list[tuple[str, str]], replies: tuple[str, str]) -> None:
    (pair,), _ = read_all(RANKINGS, FOLDER / name)
    (prompt,), _ = read_all(PROMPTS, FOLDER / name)
    assert turns(pair.messages) == turns(prompt.messages) == expected
    assert pair.replies == replies


def test_a_begun_turn_is_kept() -> None:
    assert turns(read_all(PROMPTS, FOLDER / "prompt_ends_with_assistant.jsonl")[0][0].messages) == POEM


def test_calls_and_tools_are_kept() -> None:
    (prompt,), _ = read_all(PROMPTS, FOLDER / "tool_calls_prompts.jsonl")
    assert prompt.messages == (
        Message("user", "Weather in Oslo?"),
        Message("assistant", "", (ToolCall("get_weather", '{"city": "Oslo"}'),)),
        Message("tool", "4 degrees", name="get_weather"),
    )
    assert prompt.tools == ({"type": "function", "function": {"name": "get_weather"}},)
    pairs, report = read_all(RANKINGS, FOLDER / "tool_calls_pairs.jsonl")
    assert (len(pairs), report.left_out) == (2, {})
    assert pairs[0].replies == tuple(Message("assistant", "", (ToolCall(n),)) for n in ("get_weather", "send_mail"))
