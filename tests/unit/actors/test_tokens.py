"""Prompts and replies in tokens: what the chat template says, no more and no less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors import tokens
from orchestrator.data import Message, PromptRecord
from orchestrator.errors import DataError
from tests.tiny import CHATML, tiny_tokenizer

USER = (Message("user", "Why?"),)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}" + CHATML


def decoded(tokenizer: Any, ids: Any) -> str:
    return str(tokenizer.decode(ids))


def test_a_prompt_is_what_the_template_writes_with_the_generation_prompt() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokens.render(USER, tokenizer)
    assert decoded(tokenizer, ids) == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert ids.dtype == "int32"
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Why?"}], add_generation_prompt=True, return_dict=False
    )
    assert ids.tolist() == expected


def test_a_system_prompt_is_set_before_conversations_that_have_none() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokens.render(USER, tokenizer, "Be brief.")
    assert decoded(tokenizer, ids).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    own = (Message("system", "Mine."), *USER)
    assert tokens.render(own, tokenizer, "Be brief.").tolist() == tokens.render(own, tokenizer).tolist()


def test_a_reply_ends_with_the_closing_and_is_masked_from_its_first_token() -> None:
    tokenizer = tiny_tokenizer()
    transcript = tokens.render_reply(USER, "Because.", tokenizer)
    assert decoded(tokenizer, transcript.response_tokens) == "Because.<|im_end|>"
    assert transcript.tokens[transcript.response_mask].tolist() == transcript.response_tokens.tolist()
    assert transcript.prompt_tokens.tolist() == tokens.render(USER, tokenizer).tolist()


@pytest.mark.parametrize(
    ("template", "closing"),
    [
        ("{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}</s>\n\n{% endfor %}", "</s>"),
        ("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}", "<|im_end|>"),
    ],
)
def test_the_closing_is_the_templates_or_else_the_eos_token(template: str, closing: str) -> None:
    tokenizer = tiny_tokenizer(chat_template=template)
    assert decoded(tokenizer, tokens.closing_tokens(tokenizer)) == closing


def test_a_long_transcript_loses_its_start() -> None:
    transcript = tokens.render_reply(USER, "Because.", tiny_tokenizer())
    whole, response = transcript.tokens.tolist(), transcript.response_tokens.tolist()
    for length in (len(whole) + 5, len(whole), len(whole) - 3, len(response), len(response) - 2, 1):
        kept = transcript.last(length)
        assert kept.tokens.tolist() == whole[-length:]
        assert kept.response_tokens.tolist() == response[-length:]


def test_prompts_are_prepared_in_order_and_too_long_ones_listed() -> None:
    tokenizer = tiny_tokenizer()
    records = [PromptRecord(f"p{n}", (Message("user", "ab " * n),), "ab", {"answer": n}) for n in (1, 90, 2)]
    prompts, left_out = tokens.prepare_prompts(records, tokenizer, 60)
    assert [prompt.id for prompt in prompts] == ["p1", "p2"]
    for prompt, record in zip(prompts, (records[0], records[2]), strict=True):
        assert prompt.tokens.tolist() == tokens.render(record.messages, tokenizer).tolist()
        assert prompt.meta == {
            "answer": record.meta["answer"],
            "messages": [{"role": "user", "content": record.messages[0].content}],
        }
    assert left_out == [("p90", len(tokens.render(records[1].messages, tokenizer)))]


def test_all_prompts_too_long_is_an_error_that_names_the_shortest() -> None:
    records = [PromptRecord(f"p{n}", (Message("user", "ab " * n),), "ab") for n in (50, 40)]
    with pytest.raises(DataError, match=r"all 2 prompts are longer than prompts.max_prompt_tokens=20.*'p40'"):
        tokens.prepare_prompts(records, tiny_tokenizer(), 20)


def test_a_template_that_refuses_names_the_prompt_and_the_reason() -> None:
    records = [PromptRecord("p7", USER, "Why?")]
    with pytest.raises(DataError, match="prompt 'p7': .*no system role here.*unset model.system_prompt"):
        tokens.prepare_prompts(records, tiny_tokenizer(chat_template=NO_SYSTEM), 100, "Be brief.")


def test_a_folder_without_tokenizer_or_template_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no usable tokenizer"):
        tokens.load_tokenizer(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="Set model.chat_template=FILE"):
        tokens.load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="can't be read as text"):
        tokens.load_tokenizer(tmp_path, chat_template=tmp_path / "none.jinja")
    (tmp_path / "own.jinja").write_text(CHATML)
    loaded = tokens.load_tokenizer(tmp_path, chat_template=tmp_path / "own.jinja")
    assert tokens.render(USER, loaded).tolist() == tokens.render(USER, tiny_tokenizer()).tolist()


def test_fingerprints_differ_by_vocabulary_and_by_template() -> None:
    assert tokens.fingerprint(tiny_tokenizer()) == tokens.fingerprint(tiny_tokenizer())
    assert tokens.fingerprint(tiny_tokenizer()) != tokens.fingerprint(tiny_tokenizer(chat_template=NO_SYSTEM))
    larger = tiny_tokenizer()
    larger.add_tokens(["<extra>"])
    assert tokens.fingerprint(tiny_tokenizer()) != tokens.fingerprint(larger)
