"""The text contains calls, results and tools in the template's form, or the conversation is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.text.conversations import Chat, chat_of
from jobs.prepare import TooLong, prepare_prompts
from orchestrator.data.kinds import PROMPTS, RANKINGS
from orchestrator.data.readers import read_all
from orchestrator.data.records import Message, PromptRecord, RankingRecord, ToolCall, message_dicts
from orchestrator.errors import DataError
from orchestrator.types import Prompt
from tests.rows import ranked_table
from tests.tiny import CHATML, tiny_tokenizer

CASES = Path(__file__).parents[5] / "shared" / "cases"
USER = Message("user", "Weather in Oslo? Use get_weather with city.")
CALL = Message("assistant", "", (ToolCall("get_weather", '{"city": "Oslo"}'),))
RESULT = Message("tool", "4 degrees", name="get_weather")
TOOLS = ({"type": "function", "function": {"name": "get_weather", "parameters": {}}},)
CONVERSATION = (USER, CALL, RESULT)


def prompts_of(record: PromptRecord, chat: Chat) -> list[Prompt]:
    return list(prepare_prompts([record], chat, 200, TooLong()))


def template(arguments: str, *, calls: bool = True, results: bool = True, tools: bool = True) -> str:
    """ChatML with tools; `arguments` renders those of `call.function`."""
    return (
        ("{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}" if tools else "")
        + "{% for m in messages %}"
        + ("" if results else "{% if m.role != 'tool' %}")
        + "<|im_start|>{{ m.role }}\n{{ m.reasoning_content or '' }}{{ m.content }}"
        + ("{% for call in m.tool_calls %}<call>{{ call.function.name }} " if calls else "")
        + (f"{arguments}</call>{{% endfor %}}" if calls else "")
        + "<|im_end|>\n"
        + ("" if results else "{% endif %}")
        + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


JSON = "{{ call.function.arguments | tojson }}"
FORMS = {
    "object": (JSON, '{"city": "Oslo"}'),
    "text": ("{{ '' + call.function.arguments }}", '{"city": "Oslo"}'),
    "printed": ("{{ call.function.arguments }}", '{"city": "Oslo"}'),
    "items": ("{% for k, v in call.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}", "city=Oslo;"),
    "either": (
        "{{ call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}",
        '{"city": "Oslo"}',
    ),
}


def chat(text: str) -> Chat:
    return chat_of(tiny_tokenizer(chat_template=text))


@pytest.mark.parametrize("form", FORMS)
def test_arguments_are_written_once_as_the_template_takes_them(form: str) -> None:
    written, expected = FORMS[form]
    text = chat(template(written)).prompt_text(CONVERSATION, TOOLS)
    assert f"<call>get_weather {expected}</call>" in text
    assert "<|im_start|>tool\n4 degrees<|im_end|>" in text and '"name": "get_weather"' in text
    assert text.endswith("<|im_start|>assistant\n")


def test_the_text_is_that_of_transformers() -> None:
    tokenizer = tiny_tokenizer(chat_template=template(JSON))
    expected = tokenizer.apply_chat_template(
        message_dicts(CONVERSATION), tools=list(TOOLS), add_generation_prompt=True, tokenize=False
    )
    assert chat(template(JSON)).prompt_text(CONVERSATION, TOOLS) == expected
    begun = (USER, Message("assistant", "It is"))
    expected = tokenizer.apply_chat_template(message_dicts(begun), continue_final_message=True, tokenize=False)
    assert chat(template(JSON)).prompt_text(begun) == expected
    assert expected.endswith("<|im_start|>assistant\nIt is")


@pytest.mark.parametrize(
    ("text", "messages", "tools", "fault"),
    [
        (template(JSON, calls=False), CONVERSATION, (), "nothing of the tool 'get_weather'"),
        (template("{{ 'x' }}"), CONVERSATION, (), "nothing of the arguments of a call of 'get_weather'"),
        (template(JSON, results=False), CONVERSATION, (), "nothing of the result of a tool ('4 degrees')"),
        (template(JSON, tools=False), (USER,), TOOLS, "nothing of the tool 'get_weather'"),
        (CHATML, (USER,), TOOLS, "nothing of the tool 'get_weather'"),
    ],
)
def test_what_a_template_leaves_out_is_refused_even_where_the_user_names_it(
    text: str, messages: Sequence[Message], tools: Sequence[Any], fault: str
) -> None:
    with pytest.raises(DataError) as caught:
        chat(text).prompt_text(messages, tools)
    assert fault in str(caught.value) and "model.chat_template=FILE" in str(caught.value)
    with pytest.raises(DataError, match="prompt 'p': "):
        prompts_of(PromptRecord("p", tuple(messages), "", tools=tuple(tools)), chat(text))


def test_a_call_without_arguments_needs_none() -> None:
    call = Message("assistant", "", (ToolCall("get_weather"),))
    assert "<call>get_weather {}</call>" in chat(template(JSON)).prompt_text((USER, call, RESULT))


def test_replies_that_differ_in_their_call_are_two_in_tokens() -> None:
    tools = chat(template(JSON))
    oslo, rome = (replace(CALL, tool_calls=(ToolCall("get_weather", f'{{"city": "{c}"}}'),)) for c in ("Oslo", "Rome"))
    rows = ranked_table([RankingRecord("p", (USER,), (oslo, rome, "No."), TOOLS)], tools, max_length=500)
    texts = [tools.text(tokens) for tokens in rows["response_tokens"].to_pylist()]
    assert texts == [
        '<call>get_weather {"city": "Oslo"}</call><|im_end|>',
        '<call>get_weather {"city": "Rome"}</call><|im_end|>',
        "No.<|im_end|>",
    ]


def test_replies_that_a_template_writes_alike_are_refused() -> None:
    one, two = (Message("assistant", "4", extra=f'{{"reasoning_content": "{text}"}}') for text in ("a", "b"))
    record = RankingRecord("p", (USER,), (one, two))
    assert ranked_table([record], chat(template(JSON)), max_length=500)["record"].to_pylist() == [0, 0]
    with pytest.raises(DataError, match="preference 'p': .* writes two of its replies alike"):
        ranked_table([record], chat(CHATML), max_length=500)


@pytest.mark.skipif(not CASES.is_dir(), reason=f"{CASES} is absent: it holds inputs that were misread")
def test_shared_cases_as_models_read_them() -> None:
    plain, tools = chat(CHATML), chat(template(JSON))
    (begun,), _ = read_all(PROMPTS, CASES / "prompt_ends_with_assistant.jsonl")
    (prompt,) = prompts_of(begun, plain)
    assert plain.text(prompt.tokens).endswith("<|im_start|>assistant\nRoses are")
    (pair,), _ = read_all(RANKINGS, CASES / "pairs_end_with_assistant.jsonl")
    rows = ranked_table([pair], plain, max_length=500).to_pylist()
    assert [plain.text(row["prompt_tokens"])[-9:] for row in rows] == ["Roses are"] * 2
    assert [plain.text(row["response_tokens"]) for row in rows] == [" red<|im_end|>", " dead<|im_end|>"]
    (called,), _ = read_all(PROMPTS, CASES / "tool_calls_prompts.jsonl")
    text = tools.prompt_text(called.messages, called.tools)
    assert '<call>get_weather {"city": "Oslo"}</call>' in text and "4 degrees" in text
    with pytest.raises(DataError, match="not made for tools"):
        prompts_of(called, plain)
    pairs, _ = read_all(RANKINGS, CASES / "tool_calls_pairs.jsonl")
    answers = [[tools.text(tools.reply(p.messages, r, p.tools).response_tokens) for r in p.replies] for p in pairs]
    assert answers[0] == ["<call>get_weather {}</call><|im_end|>", "<call>send_mail {}</call><|im_end|>"]
    assert answers[1][1] == "I can't know.<|im_end|>"
