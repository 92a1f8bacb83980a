"""Prompts and replies in tokens: what the chat template says, no more and no less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.conversations import Chat, chat_of, load_chat
from actors.templates import ChatSettings, read_template
from orchestrator.data import Message
from orchestrator.errors import DataError
from tests.tiny import CHATML, tiny_tokenizer

USER = (Message("user", "Why?"),)


def chat(template: str = CHATML, **settings: Any) -> Chat:
    return chat_of(tiny_tokenizer(chat_template=template), ChatSettings(**settings))


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
    with pytest.raises(DataError, match="can't be read as text"):
        read_template(tmp_path / "none.jinja")
    (tmp_path / "own.jinja").write_text(CHATML)
    loaded = load_chat(tmp_path, ChatSettings(read_template(tmp_path / "own.jinja")))
    assert loaded.prompt(USER).tolist() == chat().prompt(USER).tolist()


def test_fingerprints_differ_by_all_that_changes_what_tokens_say() -> None:
    other = CHATML.replace("\n", " ")
    larger = tiny_tokenizer()
    larger.add_tokens(["<extra>"])
    assert chat().fingerprint == chat().fingerprint
    different = [chat(), chat(other), chat_of(larger), chat(system_prompt="Be brief.")]
    assert len({one.fingerprint for one in different}) == len(different)
