"""Tokens of prompts and replies are exactly those of the chat template."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from actors.text.conversations import Chat, base_chat, chat_of, load_chat
from actors.text.templates import read_template
from orchestrator.config.sections import ModelConfig
from orchestrator.data.records import Message, ToolCall
from orchestrator.errors import DataError
from tests.tiny import CHATML, tiny_tokenizer

USER = (Message("user", "Why?"),)


def chat(template: str = CHATML, **settings: Any) -> Chat:
    return chat_of(tiny_tokenizer(chat_template=template), **settings)


def test_a_prompt_is_what_the_template_writes_with_the_generation_prompt() -> None:
    ids = chat().prompt(USER)
    assert chat().text(ids) == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert ids.dtype == "int32"
    expected = tiny_tokenizer().apply_chat_template(
        [{"role": "user", "content": "Why?"}], add_generation_prompt=True, return_dict=False
    )
    assert ids.tolist() == expected


def test_a_system_prompt_is_set_before_conversations_that_have_none() -> None:
    brief = chat(system_prompt="Be brief.")
    assert brief.prompt_text(USER).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    own = (Message("system", "Mine."), *USER)
    assert brief.prompt(own).tolist() == chat().prompt(own).tolist()


def test_a_reply_ends_with_the_closing_and_is_masked_from_its_first_token() -> None:
    transcript = chat().reply(USER, "Because.")
    assert chat().text(transcript.response_tokens) == "Because.<|im_end|>"
    assert transcript.tokens[transcript.response_mask].tolist() == transcript.response_tokens.tolist()
    assert transcript.prompt_tokens.tolist() == chat().prompt(USER).tolist()


def test_a_long_transcript_loses_its_start() -> None:
    transcript = chat().reply(USER, "Because.")
    whole, response = transcript.tokens.tolist(), transcript.response_tokens.tolist()
    for length in (len(whole) + 5, len(whole), len(whole) - 3, len(response), len(response) - 2, 1):
        kept = transcript.last(length)
        assert kept.tokens.tolist() == whole[-length:]
        assert kept.response_tokens.tolist() == response[-length:]


def test_a_folder_without_tokenizer_or_template_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no usable tokenizer"):
        load_chat(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="Set model.chat_template=FILE"):
        load_chat(tmp_path)
    (tmp_path / "latin.jinja").write_bytes("{{ 'ä' }}".encode("latin-1"))
    os.mkfifo(tmp_path / "pipe.jinja")
    faults = {"none": "does not exist", "latin": "is not UTF-8 text", "pipe": "it is a named pipe"}
    for name, fault in faults.items():
        with pytest.raises(DataError, match=rf"model.chat_template=.*{name}.jinja.* {fault}"):
            read_template(tmp_path / f"{name}.jinja")
    (tmp_path / "own.jinja").write_text(CHATML)
    loaded = load_chat(tmp_path, template=read_template(tmp_path / "own.jinja"))
    assert loaded.prompt(USER).tolist() == chat().prompt(USER).tolist()


def test_fingerprints_differ_by_all_that_changes_what_tokens_say() -> None:
    other = CHATML.replace("\n", " ")
    larger = tiny_tokenizer()
    larger.add_tokens(["<extra>"])
    assert chat().fingerprint == chat().fingerprint
    different = [chat(), chat(other), chat_of(larger), chat(system_prompt="Be brief.")]
    assert len({one.fingerprint for one in different}) == len(different)


CALLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }}({{ call.function.arguments | tojson }})</call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = ({"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}},)
CALL = Message("assistant", "", (ToolCall("weather", '{"city": "Oslo"}'),))


def test_tools_and_calls_reach_the_template() -> None:
    asked = (*USER, CALL, Message("tool", "Rain"))
    text = chat(CALLS).prompt_text(asked, TOOLS)
    assert text.startswith('[{"type": "function"') and '<call>weather({"city": "Oslo"})</call><|im_end|>' in text
    with pytest.raises(DataError, match="writes nothing of the tool 'weather': it is not made for tools"):
        chat().prompt_text(asked)
    with pytest.raises(DataError, match="writes nothing of the tool 'weather'"):
        chat().prompt_text(USER, TOOLS)


def test_a_reply_that_calls_a_tool_is_written_by_the_template_and_closed_once() -> None:
    other = Message("assistant", "", (ToolCall("weather", '{"city": "Bern"}'),))
    written = [chat(CALLS).reply(USER, reply, TOOLS) for reply in (CALL, other)]
    texts = [chat(CALLS).text(transcript.response_tokens) for transcript in written]
    assert texts == [f'<call>weather({{"city": "{city}"}})</call><|im_end|>' for city in ("Oslo", "Bern")]
    assert written[0].prompt_tokens.tolist() == chat(CALLS).prompt(USER, TOOLS).tolist()
    assert chat().text(chat().reply(USER, Message("assistant", "Yes.")).response_tokens) == "Yes.<|im_end|>"


def test_a_begun_turn_is_continued_and_not_closed() -> None:
    begun = (*USER, Message("assistant", "Roses are "))
    text = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nRoses are "
    assert chat().prompt_text(begun) == text
    assert chat().text(chat().reply(begun, "red.").tokens) == f"{text}red.<|im_end|>"
    called = chat(CALLS).reply(begun, CALL, TOOLS)
    assert chat(CALLS).text(called.response_tokens).startswith("<call>weather(")
    with pytest.raises(DataError, match="does not write an assistant's turn"):
        chat("{{ messages[0].content }}?").prompt_text(begun)


def test_a_text_that_is_closed_already_is_closed_once() -> None:
    assert chat().text(chat().reply(USER, "Yes.<|im_end|>").response_tokens) == "Yes.<|im_end|>"


def test_the_base_of_a_reward_model_keeps_its_own_template(tmp_path: Path) -> None:
    policy, base, bare = (tmp_path / name for name in ("policy", "base", "bare"))
    own = CHATML.replace("<|im_start|>", "<s>")
    tiny_tokenizer().save_pretrained(policy)
    tiny_tokenizer(chat_template=own).save_pretrained(base)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(bare)
    given = CHATML.replace("<|im_start|>", "</s>")
    model = ModelConfig(system_prompt="Be kind.")
    asked = [base_chat(folder, policy, model, given).prompt_text(USER) for folder in (policy, base, bare)]
    for text, mark in zip(asked, ("</s>", "<s>", "</s>"), strict=True):
        assert text == f"{mark}system\nBe kind.<|im_end|>\n{mark}user\nWhy?<|im_end|>\n{mark}assistant\n"
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(bare)
    with pytest.raises(DataError, match="no chat template and another vocabulary"):
        base_chat(bare, policy, model, given)


def test_an_exported_model_stops_where_this_one_did(tmp_path: Path) -> None:
    """EOS `</s>` (3), closing `<|im_end|>` (0): a server of the export must stop at both."""
    file = tmp_path / "generation_config.json"
    one = chat_of(tiny_tokenizer(eos_token="</s>"))
    for before in ({}, {"eos_token_id": 3}, {"eos_token_id": [3]}, {"eos_token_id": None}):
        file.write_text(json.dumps({"max_length": 9, **before}))
        one.save_stops(tmp_path)
        assert json.loads(file.read_text()) == {"max_length": 9, "eos_token_id": [0, 3]}
    before = {"eos_token_id": [0, 2, 3]}
    file.write_text(json.dumps(before))
    one.save_stops(tmp_path)
    assert json.loads(file.read_text()) == before
