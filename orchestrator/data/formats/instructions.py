"""Instructions and questions with their answers: Alpaca (both templates), pairs with a history, self-instruct seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from orchestrator.data.formats.transcripts import waiting, with_reply
from orchestrator.data.messages import BadRow, Fields, Messages, conversation, required, text_of
from orchestrator.data.records import Message
from orchestrator.data.values import describe

# The prompts of Stanford Alpaca (Taori 2023).
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


def instruction_of(fields: Fields) -> str:
    """The instruction, and its input (Dolly: context) after a blank line."""
    instruction, extra = _instruction_and_input(fields)
    return f"{instruction}\n\n{extra}" if extra else instruction


def templated(fields: Fields) -> str:
    """The instruction in the template of Stanford Alpaca, which has one with and one without an input."""
    instruction, extra = _instruction_and_input(fields)
    return (_WITH_INPUT if extra else _WITHOUT_INPUT).format(instruction=instruction, input=extra)


def alpaca(fields: Fields) -> Sequence[Messages]:
    return [_exchange(fields, instruction_of(fields), ("output", "response"))]


def alpaca_template(fields: Fields) -> Sequence[Messages]:
    return [_exchange(fields, templated(fields), ("output", "response"))]


def question(fields: Fields) -> Sequence[Messages]:
    return [_exchange(fields, text_of(fields, "question"), ("answer", "response"))]


def prompt_and_reply(fields: Fields) -> Sequence[Messages]:
    """{prompt, response | completion}: texts or messages."""
    messages = waiting(conversation(required(fields, "prompt"), "prompt"), "prompt")
    key = present(fields, "response", "completion")
    return [with_reply(messages, required(fields, key), key)]


def history(fields: Fields) -> Sequence[Messages]:
    """{prompt, response, history: [[question, answer], ...]}."""
    return [_exchange(fields, text_of(fields, "prompt"), ("response",))]


def seed(fields: Fields) -> Iterator[Messages]:
    """{instruction, instances: [{input, output}]} of self-instruct (Wang 2023): a conversation per instance."""
    instances = required(fields, "instances")
    if not isinstance(instances, list) or not instances or not all(isinstance(item, dict) for item in instances):
        raise BadRow(f"'instances' must be a list of {{input, output}}, found {describe(instances)}")
    for instance in instances:
        whole = {"instruction": required(fields, "instruction"), **instance}
        yield _exchange(whole, instruction_of(whole), ("output",))


def present(fields: Fields, *keys: str) -> str:
    """The first of the keys that the row has, or the first."""
    return next((key for key in keys if key in fields), keys[0])


def _instruction_and_input(fields: Fields) -> tuple[str, str]:
    key = present(fields, "input", "context")
    extra = fields.get(key) or ""
    if not isinstance(extra, str):
        raise BadRow(f"{key!r} must be text, found {describe(extra)}")
    return text_of(fields, "instruction"), extra if extra.strip() else ""


def _exchange(fields: Fields, asked: str, keys: Sequence[str]) -> Messages:
    """The row's system message and history, the question, and the reply in the first of `keys` that it has."""
    key = present(fields, *keys)
    answer = required(fields, key)
    if not isinstance(answer, str):
        raise BadRow(f"{key!r} must be text, found {describe(answer)}")
    before = (*_system(fields), *_history(fields.get("history") or []))
    return (*before, Message("user", asked), Message("assistant", answer))


def _system(fields: Fields) -> Messages:
    key = present(fields, "system", "system_prompt")
    return (Message("system", text_of(fields, key)),) if fields.get(key) else ()


def _history(pairs: Any) -> Iterator[Message]:
    if not isinstance(pairs, list):
        raise BadRow(f"'history' must be a list of [question, answer], found {describe(pairs)}")
    for index, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise BadRow(f"history[{index}] must be [question, answer], two texts, found {describe(pair)}")
        if not pair[0].strip():
            raise BadRow(f"history[{index}]: the question is empty")
        yield Message("user", pair[0])
        yield Message("assistant", pair[1])
