"""Prompt, learned reply, closing and stops in common chat templates, written manually."""

# ruff: noqa: E501  templates are more readable unwrapped

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from actors.text.conversations import chat_of
from orchestrator.data.records import Message
from orchestrator.errors import DataError
from tests.tiny import CHATML
from tests.unit.actors.letters import SPECIAL, letters

LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] "
    "| trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
ALPACA = "### Instruction:\n{{ messages[-1]['content'] }}\n\n### Response:\n"
ASK_ALWAYS = CHATML.replace("{% if add_generation_prompt %}", "").removesuffix("{% endif %}")
PROMPT_ONLY = "{% for m in messages %}{{ m['content'] }}{% endfor %}Answer:"
HUMAN = (
    "{% for m in messages %}{{ '### ' + ('Human' if m['role'] == 'user' else 'Assistant') + ': ' + m['content'] + '\n' }}"
    "{% endfor %}### Assistant:"
)
USER_NEXT = "{% for m in messages %}{{ m['role'] | capitalize + ': ' + m['content'] + '\n' }}{% endfor %}Assistant:"
LAST_TURN_ENDS = "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + ('' if not loop.last else '<|end|>') }}{% endfor %}"
NO_REPLIES = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ raise_exception('questions only') }}{% endif %}"
    "{{ 'Q: ' + m['content'] + '\nA:' }}{% endfor %}"
)
SYSTEM_FIRST = (
    "{% if messages[0]['role'] != 'system' %}{{ raise_exception('a system message first') }}{% endif %}" + CHATML
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}"
    + ASK_ALWAYS
)


@dataclass(frozen=True)
class Case:
    template: str
    eos: str
    prompt: str
    closing: str
    stops: tuple[str, ...]
    bos: str | None = None


CASES = {
    "ChatML": Case(CHATML, "<|im_end|>", "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>", ("<|im_end|>",)),
    "Llama-2": Case(LLAMA2, "</s>", "<s>[INST] hi [/INST]", "</s>", ("</s>",), "<s>"),
    "Llama-3": Case(
        LLAMA3, "<|eot_id|>",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>", ("<|eot_id|>",), "<|begin_of_text|>",
    ),
    "Gemma": Case(
        GEMMA, "<eos>", "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>",
        ("<eos>", "<end_of_turn>"), "<bos>",
    ),
    "Mistral": Case(MISTRAL, "</s>", "<s>[INST] hi [/INST]", "</s>", ("</s>",), "<s>"),
    "Zephyr": Case(ZEPHYR, "</s>", "<|user|>\nhi</s>\n<|assistant|>\n", "</s>", ("</s>",)),
    "Phi-3": Case(PHI3, "<|endoftext|>", "<|user|>\nhi<|end|>\n<|assistant|>\n", "<|end|>", ("<|endoftext|>", "<|end|>")),
    "Vicuna": Case(VICUNA, "</s>", "USER: hi ASSISTANT:", "</s>", ("</s>",)),
    "Alpaca, prompts only": Case(ALPACA, "</s>", "### Instruction:\nhi\n\n### Response:", "</s>", ("</s>",)),
    "ChatML on a base tokenizer": Case(
        CHATML, "<|endoftext|>", "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>",
        ("<|im_end|>", "<|endoftext|>"),
    ),
    "generation prompt always": Case(
        ASK_ALWAYS, "<|im_end|>", "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>", ("<|im_end|>",)
    ),
    "generation prompt always, base tokenizer": Case(
        ASK_ALWAYS, "<|endoftext|>", "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>",
        ("<|im_end|>", "<|endoftext|>"),
    ),
    "generation prompt always, default system prompt": Case(
        DEFAULT_SYSTEM, "<|im_end|>",
        "<|im_start|>system\nYou are kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>",
        ("<|im_end|>",),
    ),
    "prompt only, Answer:": Case(PROMPT_ONLY, "</s>", "hiAnswer:", "</s>", ("</s>",)),
    "plain headers": Case(HUMAN, "</s>", "### Human: hi\n### Assistant:", "</s>", ("</s>",)),
    "plain headers, user next": Case(USER_NEXT, "</s>", "User: hi\nAssistant:", "</s>", ("</s>",)),
    "only the last turn ends": Case(LAST_TURN_ENDS, "</s>", "[user] hi<|end|>", "</s>", ("</s>",)),
    "replies refused": Case(NO_REPLIES, "</s>", "Q: hi\nA:", "</s>", ("</s>",)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_prompt_learned_reply_closing_and_stops(name: str) -> None:
    case = CASES[name]
    chat = chat_of(letters(case.template, case.eos, bos=case.bos))
    messages = (Message("user", "hi"),)
    assert chat.prompt_text(messages) == case.prompt
    learned = chat.reply(messages, "yes")
    assert chat.text(learned.response_tokens) == f"yes{case.closing}"
    assert learned.response_tokens.tolist() == [*chat.tokenizer.convert_tokens_to_ids([*"yes"]), *chat.closing]
    assert sorted(chat.tokenizer.convert_ids_to_tokens(list(chat.stops))) == sorted(case.stops)
    assert chat.text(chat.closing) == case.closing and int(chat.closing[-1]) in chat.stops
    expected = chat.tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=False
    )
    assert learned.prompt_tokens.tolist() == expected


TEXT_END = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '[END]\n' }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "special", "end"),
    [
        (TEXT_END, SPECIAL, "[END]"),
        (ZEPHYR.replace("eos_token", "'</s>'"), ("<eos>",), "</s>"),  # the template of another model
        ("{% for m in messages %}{{ m['content'] }}.{% endfor %}", SPECIAL, "."),
    ],
)
def test_a_closing_in_plain_text_is_refused_with_the_way_out(template: str, special: tuple[str, ...], end: str) -> None:
    with pytest.raises(
        DataError, match=r"plain text for its tokenizer.*tokenizer.add_tokens.*model.chat_template=FILE"
    ) as found:
        chat_of(letters(template, special[0], special=special))
    assert repr(end) in str(found.value)


def test_an_end_mark_that_is_not_flagged_special_closes_and_stops() -> None:
    chat = chat_of(letters(TEXT_END, "</s>", plain=["[END]"]))
    assert chat.text(chat.closing) == "[END]"
    assert chat.tokenizer.convert_ids_to_tokens(list(chat.stops)) == ["</s>", "[END]"]


def test_a_closing_of_several_tokens_stops_at_its_last() -> None:
    chat = chat_of(letters(TEXT_END.replace("[END]", "[END]</s>")))
    assert chat.text(chat.closing) == "[END]</s>" and len(chat.closing) == 6
    assert chat.tokenizer.convert_ids_to_tokens(list(chat.stops)) == ["</s>"]
    (learned,) = [chat.reply((Message("user", "hi"),), "yes").response_tokens]
    assert chat.text(chat.body(learned)) == "yes"


def test_a_template_that_asks_for_a_system_message_is_understood() -> None:
    chat = chat_of(letters(SYSTEM_FIRST, "<|endoftext|>"))
    assert chat.text(chat.closing) == "<|im_end|>"


def test_no_closing_and_no_eos_is_an_error() -> None:
    with pytest.raises(DataError, match="nothing marks where a reply ends"):
        chat_of(letters(PROMPT_ONLY, None))


def folder_with(tmp_path: Path, **files: object) -> Path:
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return tmp_path


def stops_of(folder: Path) -> list[str]:
    chat = chat_of(letters(PROMPT_ONLY, "</s>"), folder=folder)
    return [str(token) for token in chat.tokenizer.convert_ids_to_tokens(list(chat.stops))]


def id_of(token: str) -> int:
    return int(letters(None).convert_tokens_to_ids(token))


@pytest.mark.parametrize(
    "files",
    [
        {"config": {"eos_token_id": [id_of("<|eot_id|>"), id_of("</s>")]}},
        {"config": {"text_config": {"eos_token_id": id_of("<|eot_id|>")}}},
        {"generation_config": {"eos_token_id": [id_of("<|eot_id|>")]}, "config": {"eos_token_id": id_of("</s>")}},
        {"generation_config": {"temperature": 0.1}, "config": {"eos_token_id": id_of("<|eot_id|>")}},
    ],
)
def test_stops_are_named_by_any_of_the_models_files(tmp_path: Path, files: dict[str, object]) -> None:
    assert stops_of(folder_with(tmp_path, **files)) == ["</s>", "<|eot_id|>"]


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ({"config": {"eos_token_id": id_of("e")}}, "config.json ends replies at token .* ordinary text 'e'"),
        (
            {"generation_config": {"eos_token_id": [5, 99_999]}},
            "generation_config.json ends replies at token 99999, and",
        ),
        ({"config": {"eos_token_id": "</s>"}}, "must be a token id or a list of them, found '</s>'"),
        ({"config": {"eos_token_id": [True]}}, "must be a token id"),
        ({"config": "{"}, "can't be read as JSON"),
        ({"generation_config": "[]"}, "must hold a JSON object, found list"),
        ({"config": "[" * 100_000}, "can't be read as JSON"),
    ],
)
def test_stops_that_cannot_be_right_are_refused(tmp_path: Path, files: dict[str, object], fault: str) -> None:
    with pytest.raises(DataError, match=fault):
        stops_of(folder_with(tmp_path, **files))


def test_a_pipe_in_the_place_of_a_models_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(DataError, match="config.json can't be read: it is a named pipe"):
        stops_of(tmp_path)


def test_an_eos_that_is_not_in_the_vocabulary_is_refused() -> None:
    tokenizer = letters(CHATML, "<|im_end|>")
    tokenizer._special_tokens_map["eos_token"] = "<nowhere>"
    with pytest.raises(DataError, match="'<nowhere>' .* is not in its vocabulary"):
        chat_of(tokenizer)


@pytest.mark.parametrize("ended_by", ["", "<|im_end|>", "<|endoftext|>", "<|im_end|><|endoftext|>"])
def test_a_reply_is_closed_once_however_it_ended(ended_by: str) -> None:
    chat = chat_of(letters(CHATML, "<|endoftext|>"))
    sampled = chat.reply((Message("user", "hi"),), f"yes{ended_by}").response_tokens
    assert chat.text(sampled) == "yes<|im_end|>"
    raw = np.array(chat.tokenizer(f"yes{ended_by}", add_special_tokens=False)["input_ids"], np.int32)
    assert chat.text(chat.closed(raw)) == "yes<|im_end|>" and chat.text(chat.body(raw)) == "yes"
