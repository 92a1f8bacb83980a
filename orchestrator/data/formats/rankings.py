"""Formats of preferences: a row -> a prompt and its replies, best first. A new one is a function and a line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from orchestrator.data.formats.feedback import helpsteer_pair, ultrafeedback_ranking
from orchestrator.data.formats.format import Format, field_sets
from orchestrator.data.formats.oasst import OASST_FIELDS, oasst_rankings, trees
from orchestrator.data.formats.transcripts import (
    Ranked,
    after_begun,
    as_ranked,
    as_reply,
    conversations,
    hh_transcripts,
    is_conversation,
    pair,
    waiting,
)
from orchestrator.data.messages import (
    BadRow,
    Fields,
    conversation,
    required,
)
from orchestrator.data.values import describe


def _ranking(fields: Fields) -> Iterable[Ranked]:
    """{prompt | messages, replies: best first}. A reply that occurs twice keeps its better rank.

    `continued: true` says that replies to a begun turn never repeat its beginning.
    """
    key = "messages" if "messages" in fields else "prompt"
    replies = [as_reply(value, "replies") for value in _listed(required(fields, "replies"), "replies")]
    if len(replies) < 2:
        raise BadRow(f"'replies' must hold at least two replies, best first; found {len(replies)}")
    messages = waiting(conversation(required(fields, key), key), key)
    return [as_ranked(messages, replies if fields.get("continued") is True else after_begun(messages, replies))]


def _pairwise(fields: Fields) -> Iterable[Ranked]:
    """{prompt | context, chosen, rejected}: texts, lists of texts (each chosen beats each rejected), or messages.

    Messages are the reply alone, the turns after the prompt, or the whole conversation including the prompt.
    """
    key = "context" if "prompt" not in fields and "context" in fields else "prompt"
    chosen, rejected = required(fields, "chosen"), required(fields, "rejected")
    if not (is_conversation(chosen) or is_conversation(rejected)):
        messages = waiting(conversation(required(fields, key), key), key)
        good, bad = ([as_reply(v, k) for v in _listed(fields[k], k)] for k in ("chosen", "rejected"))
        return [as_ranked(messages, after_begun(messages, (better, worse))) for better in good for worse in bad]
    return [pair(*conversations(fields, key))]


def _hh_pair(fields: Fields) -> Iterable[Ranked]:
    messages, replies = pair(*hh_transcripts(fields))
    if messages[-1].role == "assistant":
        raise BadRow("'chosen' and 'rejected' end with two consecutive turns of the assistant")
    return [(messages, replies)]


def _listed(value: Any, key: str) -> Sequence[Any]:
    replies = [value] if isinstance(value, str | dict) else value
    if not isinstance(replies, list) or not replies:
        raise BadRow(f"{key!r} must be text or a list of texts, found {describe(value)}")
    return replies


# In this order: `auto` takes the first that fits.
RANKING_FORMATS: dict[str, Format[Ranked]] = {
    "ranking": Format(field_sets("replies"), _ranking),
    "pairwise": Format(field_sets("prompt chosen rejected", "context chosen rejected"), _pairwise),
    "hh-rlhf": Format(field_sets("chosen rejected"), _hh_pair),
    "oasst": Format(OASST_FIELDS, oasst_rankings, gather=trees),
    "ultrafeedback": Format(field_sets("instruction completions"), ultrafeedback_ranking),
    "helpsteer": Format(
        field_sets(
            "context response1 response2 overall_preference", "prompt response_1 response_2 preference_strength"
        ),
        helpsteer_pair,
    ),
}
