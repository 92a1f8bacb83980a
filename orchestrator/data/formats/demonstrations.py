"""Formats of demonstrations: a row -> whole conversations, whose assistant turns are learned."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.data.formats import argilla, instructions
from orchestrator.data.formats.format import Format, field_sets
from orchestrator.data.formats.label_studio import studio_replies
from orchestrator.data.formats.oasst import OASST_FIELDS, oasst_paths, trees
from orchestrator.data.formats.sharegpt import sharegpt_turns
from orchestrator.data.formats.transcripts import whole_transcript, with_reply
from orchestrator.data.messages import BadRow, Fields, Messages, conversation, is_messages, required
from orchestrator.data.values import describe


def _messages(fields: Fields) -> Sequence[Messages]:
    value = required(fields, "messages")
    if not is_messages(value):
        raise BadRow(f"'messages' must be a list of {{role, content}}, found {describe(value)}")
    return [conversation(value, "messages")]


def _sharegpt(fields: Fields) -> Sequence[Messages]:
    return [sharegpt_turns(fields)]


def _chosen(fields: Fields) -> Sequence[Messages]:
    """The conversation that ends with the chosen reply of a pair."""
    if not fields.get("prompt"):
        return [whole_transcript(fields, "chosen")]
    return [with_reply(conversation(fields["prompt"], "prompt"), required(fields, "chosen"), "chosen")]


# In this order: `auto` takes the first that fits.
DEMONSTRATION_FORMATS: dict[str, Format[Messages]] = {
    "messages": Format(field_sets("messages"), _messages),
    "sharegpt": Format(field_sets("conversations"), _sharegpt),
    "oasst": Format(OASST_FIELDS, oasst_paths, id_key="message_tree_id", gather=trees),
    "alpaca": Format(field_sets("instruction output", "instruction response"), instructions.alpaca),
    "alpaca-template": Format(field_sets("instruction output", "instruction response"), instructions.alpaca_template),
    "seeds": Format(field_sets("instruction instances"), instructions.seed),
    "history": Format(field_sets("prompt response history"), instructions.history),
    "prompt": Format(field_sets("prompt response", "prompt completion"), instructions.prompt_and_reply),
    "question": Format(field_sets("question answer", "question response"), instructions.question),
    "chosen": Format(field_sets("chosen rejected"), _chosen),
    "argilla": Format(argilla.fields_of(argilla.REPLY), argilla.argilla_replies, id_key=""),
    "label-studio": Format(field_sets("data annotations"), studio_replies, id_key=""),
}
