"""Learned tokens are the assistant's turns, and every reply is learned once after the prompt that an engine gets."""

# ruff: noqa: E501  templates read best in their own lines

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from actors.text.conversations import Chat, chat_of
from actors.text.learned import Row, Rows, rows_of
from orchestrator.data.records import Message, ToolCall
from orchestrator.errors import DataError
from tests.tiny import CHATML, tiny_tokenizer
from tests.unit.actors.letters import letters
from tests.unit.actors.text.test_closings import CASES

# Thoughts of earlier turns are dropped, and a last turn without thoughts gets an empty one.
THINKING = (
    "{% for m in messages %}{% if m['role'] != 'assistant' %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% elif loop.last %}{{ '<|im_start|>assistant\n<think>\n' + (m['reasoning_content'] or '') + '\n</think>\n\n' + m['content'] + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>assistant\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINK_FIRST = THINKING.replace(
    "{{ '<|im_start|>assistant\n' }}{% endif %}", "{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
TALK = (
    Message("user", "hi"),
    Message("assistant", "yes"),
    Message("user", "and then"),
    Message("assistant", "no more"),
)
ONE_TURN = ("Alpaca, prompts only", "prompt only, Answer:", "replies refused")
REWRITING = ("only the last turn ends", "generation prompt always", "generation prompt always, base tokenizer",
             "generation prompt always, default system prompt", "plain headers", "plain headers, user next")  # fmt: skip


def spans(chat: Chat, row: Row) -> list[str]:
    """Learned runs of a row, as text."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], row.learn, [False]]).astype(int)))
    return [chat.text(row.tokens[start:end]) for start, end in edges.reshape(-1, 2)]


def require_prompts(chat: Chat, rows: Sequence[Row], messages: Sequence[Message]) -> None:
    """Whatever precedes a learned span is the prompt that an engine would get."""
    prompts = [
        chat.prompt(messages[:place]).tolist() for place, turn in enumerate(messages) if turn.role == "assistant"
    ]
    starts = [
        row.tokens[:place].tolist() for row in rows for place in np.flatnonzero(np.diff(row.learn.astype(int)) == 1) + 1
    ]
    assert starts == prompts


@pytest.mark.parametrize("name", sorted(CASES.keys() - {*ONE_TURN, *REWRITING}))
def test_one_row_learns_both_replies_and_their_closings(name: str) -> None:
    case = CASES[name]
    chat = chat_of(letters(case.template, case.eos, bos=case.bos))
    (row,), was_split = rows_of(chat, TALK)
    assert [text.replace(" ", "") for text in spans(chat, row)] == [f"yes{case.closing}", f"nomore{case.closing}"]
    assert not was_split and not row.learn[0]
    require_prompts(chat, [row], TALK)


def test_a_template_that_takes_content_in_parts_gets_it_so() -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for part in m['content'] %}{% if part['type'] == 'image' %}"
        "{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    chat = chat_of(letters(template, "<|im_end|>"))
    (row,), _ = rows_of(chat, TALK)
    assert spans(chat, row) == ["yes<|im_end|>", "no more<|im_end|>"]
    assert chat.text(row.tokens).startswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_a_template_that_closes_twice_is_learned_closed_once() -> None:
    template = CASES["Phi-3"].template  # writes EOS behind the conversation, which is its closing here
    chat = chat_of(letters(template, "<|end|>"))
    rows, _ = rows_of(chat, TALK)
    assert [text for row in rows for text in spans(chat, row)] == ["yes<|end|>", "no more<|end|>"]


def test_what_a_template_writes_around_a_reply_is_learned_with_it() -> None:
    case = CASES["Llama-2"]
    chat = chat_of(letters(case.template, case.eos, bos=case.bos))
    (row,), _ = rows_of(chat, TALK)
    assert spans(chat, row) == [" yes </s>", " no more </s>"]


@pytest.mark.parametrize("name", ONE_TURN)
def test_templates_for_prompts_alone_learn_the_reply_as_it_is(name: str) -> None:
    case = CASES[name]
    chat = chat_of(letters(case.template, case.eos, bos=case.bos))
    (row,), _ = rows_of(chat, TALK[:2])
    assert spans(chat, row) == [f"yes{case.closing}"]
    require_prompts(chat, [row], TALK[:2])


@pytest.mark.parametrize("name", REWRITING)
def test_every_reply_is_learned_once_where_a_template_rewrites_earlier_turns(name: str) -> None:
    case = CASES[name]
    chat = chat_of(letters(case.template, case.eos, bos=case.bos))
    rows, was_split = rows_of(chat, TALK)
    found = [text.strip() for row in rows for text in spans(chat, row)]
    assert found == [f"yes{case.closing}", f"no more{case.closing}"] and not was_split
    require_prompts(chat, rows, TALK)


def test_a_thought_is_learned_with_its_reply_and_is_gone_from_later_prompts() -> None:
    chat = chat_of(letters(THINKING, "<|im_end|>"))
    talk = (TALK[0], Message("assistant", "yes", extra='{"reasoning_content": "why"}'), *TALK[2:])
    rows, _ = rows_of(chat, talk)
    assert [spans(chat, row) for row in rows] == [
        ["<think>\nwhy\n</think>\n\nyes<|im_end|>"],
        ["<think>\n\n</think>\n\nno more<|im_end|>"],
    ]
    assert "why" not in chat.text(rows[1].tokens)
    require_prompts(chat, rows, talk)


def test_a_thought_that_the_prompt_begins_is_learned_from_there_on() -> None:
    chat = chat_of(letters(THINK_FIRST, "<|im_end|>"))
    rows, _ = rows_of(chat, TALK)
    assert [spans(chat, row) for row in rows] == [["\n</think>\n\nyes<|im_end|>"], ["\n</think>\n\nno more<|im_end|>"]]


@pytest.mark.parametrize(
    "text", ["你好，世界！今天天气怎么样？", "שלום עולם", "naïve — “quotes” 🙂", "  indented\n\ncode  "]
)
def test_any_script_is_learned_as_it_is(text: str) -> None:
    chat = chat_of(tiny_tokenizer())
    (row,), _ = rows_of(chat, (Message("user", text), Message("assistant", text)))
    assert spans(chat, row) == [f"{text}<|im_end|>"]


def test_calls_of_tools_are_learned_and_their_results_are_not() -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{% for c in m['tool_calls'] %}"
        "{{ '<call>' + c['function']['name'] + (c['function']['arguments'] | tojson) }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    chat = chat_of(letters(template, "<|im_end|>"))
    talk = (
        Message("user", "sum"),
        Message("assistant", "", (ToolCall("add", '{"a": 1}'),)),
        Message("tool", "42"),
        Message("assistant", "it is 42"),
    )
    (row,), _ = rows_of(chat, talk)
    assert spans(chat, row) == ['<call>add{"a": 1}<|im_end|>', "it is 42<|im_end|>"]


def long_talk(num_exchanges: int) -> list[Message]:
    turns = [(Message("user", f"question {i}"), Message("assistant", f"answer {i}")) for i in range(num_exchanges)]
    return [Message("system", "Be kind."), *(turn for pair in turns for turn in pair)]


@pytest.mark.parametrize("max_length", [120, 200, 333, 5000])
def test_a_split_loses_no_reply_and_keeps_the_system_message(max_length: int) -> None:
    chat = chat_of(letters(CHATML, "<|im_end|>"))
    talk, rows = long_talk(9), Rows()
    rows.add(chat, talk, max_length=max_length)
    assert [text for row in rows.rows for text in spans(chat, row)] == [f"answer {i}<|im_end|>" for i in range(9)]
    assert all(len(row.tokens) <= max_length for row in rows.rows)
    assert all(chat.text(row.tokens).startswith("<|im_start|>system\nBe kind.") for row in rows.rows)
    assert (rows.num_split, rows.num_cut, rows.num_lost) == (int(max_length < 500), 0, 0)


def test_what_does_not_fit_is_cut_at_its_end_and_counted() -> None:
    chat = chat_of(letters(CHATML, "<|im_end|>"))
    rows = Rows()
    rows.add(chat, (Message("user", "hi"), Message("assistant", "a" * 100)), max_length=80)
    rows.add(chat, (Message("user", "q" * 100), Message("assistant", "never")), max_length=80)
    (row,) = rows.rows
    assert set(chat.text(row.tokens[row.learn])) == {"a"} and len(row.tokens) == 80
    assert (rows.num_split, rows.num_cut, rows.num_lost) == (0, 2, 1)
    assert "sft.max_length=80 and were cut" in rows.describe("sft.max_length=80")


def test_the_table_holds_every_token_and_mark() -> None:
    chat = chat_of(letters(CHATML, "<|im_end|>"))
    rows = Rows()
    for count in (1, 3):
        rows.add(chat, long_talk(count), max_length=1000)
    for row, found in zip(rows.rows, rows.table().to_pylist(), strict=True):
        assert found["prompt_tokens"] + found["response_tokens"] == row.tokens.tolist()
        assert [False] * len(found["prompt_tokens"]) + found["learn"] == row.learn.tolist()
        assert found["learn"][0]


def test_every_token_of_a_text_is_learned_once_up_to_its_end() -> None:
    tokenizer, text = letters(CHATML, "</s>", bos="<s>"), "".join(chr(97 + n % 26) for n in range(50))
    chat = chat_of(letters(CHATML, "</s>"))
    for max_length in (7, 20, 51, 52, 100):
        rows = Rows()
        rows.add_text(text, tokenizer, max_length=max_length)
        learned = "".join(chat.text(row.tokens[row.learn]) for row in rows.rows)
        assert learned == text[1:] + "</s>"  # nothing precedes the first token
        assert all(len(row.tokens) <= max_length and not row.learn[0] for row in rows.rows)
        assert rows.num_split == (max_length < 51)


def test_a_conversation_that_the_template_refuses_is_an_error() -> None:
    case = CASES["Gemma"]
    chat = chat_of(letters(case.template, case.eos, bos=case.bos))
    with pytest.raises(DataError, match="System role not supported"):
        rows_of(chat, long_talk(1))
