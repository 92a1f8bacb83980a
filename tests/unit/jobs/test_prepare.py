"""Rendering and filtering of a run's prompts."""

from __future__ import annotations

import pytest

from actors.text.conversations import Chat, chat_of
from jobs.prepare import prepare_prompts
from orchestrator.data.records import Message, PromptRecord
from orchestrator.errors import DataError
from tests.tiny import CHATML, tiny_tokenizer

NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}" + CHATML


def chat(template: str = CHATML, system_prompt: str | None = None) -> Chat:
    return chat_of(tiny_tokenizer(chat_template=template), system_prompt=system_prompt)


def test_prompts_are_prepared_in_order_and_too_long_ones_listed() -> None:
    records = [PromptRecord(f"p{n}", (Message("user", "ab " * n),), "ab", {"answer": n}) for n in (1, 90, 2)]
    prompts, left_out = prepare_prompts(records, chat(), 60)
    assert [prompt.id for prompt in prompts] == ["p1", "p2"]
    for prompt, record in zip(prompts, (records[0], records[2]), strict=True):
        assert prompt.tokens.tolist() == chat().prompt(record.messages).tolist()
        assert prompt.meta == {
            "answer": record.meta["answer"],
            "messages": [{"role": "user", "content": record.messages[0].content}],
        }
    assert left_out == [("p90", len(chat().prompt(records[1].messages)))]


def test_all_prompts_too_long_is_an_error_that_names_the_shortest() -> None:
    records = [PromptRecord(f"p{n}", (Message("user", "ab " * n),), "ab") for n in (50, 40)]
    with pytest.raises(DataError, match=r"all 2 prompts are longer than prompts.max_prompt_tokens=20.*'p40'"):
        prepare_prompts(records, chat(), 20)


def test_a_template_that_refuses_names_the_prompt_and_the_reason() -> None:
    records = [PromptRecord("p7", (Message("user", "Why?"),), "Why?")]
    with pytest.raises(DataError, match="prompt 'p7': .*no system role here.*unset model.system_prompt"):
        prepare_prompts(records, chat(NO_SYSTEM, "Be brief."), 100)
