"""Formats of prompts: a row -> the conversation up to the assistant's reply. A new one is a function and a line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.data.formats.transcripts import (
    FieldSets,
    conversations,
    hh_transcripts,
    is_conversation,
    num_before_reply,
    num_common,
    waiting,
    without_last_reply,
)
from orchestrator.data.messages import (
    BadRow,
    Fields,
    Messages,
    conversation,
    required,
    text_of,
)
from orchestrator.data.records import Message
from orchestrator.data.values import describe


def _prompt(fields: Fields) -> Messages:
    """A conversation up to the assistant's reply; an assistant's message at its end is the beginning of the reply.

    In a row of preferences whose replies are whole conversations, the prompt may be their last turn alone.
    """
    pair = [fields[key] for key in ("chosen", "rejected") if key in fields]
    if len(pair) == 2 and any(map(is_conversation, pair)):
        chosen, rejected = conversations(fields, "prompt")
        return waiting(chosen[: num_before_reply(chosen, rejected)], "chosen")
    return waiting(conversation(required(fields, "prompt"), "prompt"), "prompt")


def _messages(fields: Fields) -> Messages:
    """A whole conversation; the assistant's last message is not part of the prompt."""
    return without_last_reply(conversation(required(fields, "messages"), "messages"))


def _hh_prompt(fields: Fields) -> Messages:
    chosen, rejected = hh_transcripts(fields)
    return without_last_reply(chosen[: num_common(chosen, rejected)])


def _alpaca(fields: Fields) -> Messages:
    instruction, extra = text_of(fields, "instruction"), fields.get("input") or ""
    if not isinstance(extra, str):
        raise BadRow(f"'input' must be text, found {describe(extra)}")
    return (Message("user", f"{instruction}\n\n{extra}" if extra.strip() else instruction),)


def _question(fields: Fields) -> Messages:
    return (Message("user", text_of(fields, "question")),)


@dataclass(frozen=True)
class PromptFormat:
    """Args:
    parse: the conversation of a row.
    consumed: fields that the conversation is made from; all others become the prompt's meta.
    """

    fields: FieldSets
    parse: Callable[[Fields], Messages]
    consumed: frozenset[str]


EVERYWHERE = frozenset({"id", "tools", "functions"})
"""Fields that every format reads."""

# In this order: `auto` takes the first that fits.
PROMPT_FORMATS: dict[str, PromptFormat] = {
    "messages": PromptFormat([frozenset({"messages"})], _messages, frozenset({"messages"})),
    "prompt": PromptFormat([frozenset({"prompt"})], _prompt, frozenset({"prompt"})),
    "hh-rlhf": PromptFormat([frozenset({"chosen", "rejected"})], _hh_prompt, frozenset({"chosen", "rejected"})),
    "alpaca": PromptFormat([frozenset({"instruction"})], _alpaca, frozenset({"instruction", "input"})),
    "question": PromptFormat([frozenset({"question"})], _question, frozenset({"question"})),
}
