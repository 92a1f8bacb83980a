"""Formats of prompts: a row -> the conversation up to the assistant's reply. A new one is a function and a line."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.data.formats.format import Format, field_sets
from orchestrator.data.formats.instructions import instruction_of, templated
from orchestrator.data.formats.oasst import OASST_FIELDS, oasst_prompts, trees
from orchestrator.data.formats.sharegpt import sharegpt_turns
from orchestrator.data.formats.transcripts import (
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

Conversations = Sequence[Messages]


def _prompt(fields: Fields) -> Conversations:
    """A conversation up to the assistant's reply; an assistant's message at its end is the beginning of the reply.

    In a row of preferences whose replies are whole conversations, the prompt may be their last turn alone.
    """
    pair = [fields[key] for key in ("chosen", "rejected") if key in fields]
    if len(pair) == 2 and any(map(is_conversation, pair)):
        chosen, rejected = conversations(fields, "prompt")
        return [waiting(chosen[: num_before_reply(chosen, rejected)], "chosen")]
    return [waiting(conversation(required(fields, "prompt"), "prompt"), "prompt")]


def _messages(fields: Fields) -> Conversations:
    """A whole conversation; the assistant's last message is not part of the prompt."""
    return [without_last_reply(conversation(required(fields, "messages"), "messages"))]


def _sharegpt(fields: Fields) -> Conversations:
    return [without_last_reply(sharegpt_turns(fields))]


def _hh_prompt(fields: Fields) -> Conversations:
    chosen, rejected = hh_transcripts(fields)
    return [without_last_reply(chosen[: num_common(chosen, rejected)])]


def _alpaca(fields: Fields) -> Conversations:
    return [(Message("user", instruction_of(fields)),)]


def _alpaca_template(fields: Fields) -> Conversations:
    return [(Message("user", templated(fields)),)]


def _question(fields: Fields) -> Conversations:
    return [(Message("user", text_of(fields, "question")),)]


def _mt_bench(fields: Fields) -> Conversations:
    """{question_id, category, turns}: the first question; later ones stay in the meta."""
    turns = required(fields, "turns")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise BadRow(f"'turns' must be a list of questions, found {describe(turns)}")
    return [(Message("user", turns[0]),)]


EVERYWHERE = frozenset({"id", "tools", "functions"})
"""Fields that every format reads."""
_INSTRUCTION = frozenset({"instruction", "input"})

# In this order: `auto` takes the first that fits.
PROMPT_FORMATS: dict[str, Format[Messages]] = {
    "messages": Format(field_sets("messages"), _messages, frozenset({"messages"})),
    "oasst": Format(OASST_FIELDS, oasst_prompts, frozenset({"prompt", "message_tree_id", "tree_state"}), gather=trees),
    "prompt": Format(field_sets("prompt"), _prompt, frozenset({"prompt"})),
    "hh-rlhf": Format(field_sets("chosen rejected"), _hh_prompt, frozenset({"chosen", "rejected"})),
    "alpaca": Format(field_sets("instruction"), _alpaca, _INSTRUCTION),
    "alpaca-template": Format(field_sets("instruction"), _alpaca_template, _INSTRUCTION),
    "question": Format(field_sets("question"), _question, frozenset({"question"})),
    "sharegpt": Format(field_sets("conversations"), _sharegpt, frozenset({"conversations", "system"})),
    "mt-bench": Format(field_sets("question_id turns"), _mt_bench, id_key="question_id"),
}
